"""OpenAI's chat completions as far as `ivtp serve` takes and gives them."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def _neutral(*values: Any) -> Any:
    """Declare a field that clients send without meaning anything by it; only these values and null are taken."""
    return Field(None, json_schema_extra={"enum": [*values, None]})


class Part(BaseModel):
    """A piece of a message: `text`, or a picture as an http(s) address, a data URL or base64."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text", "image_url", "image"]
    text: str | None = None
    image_url: dict[str, Any] | str | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class ChatRequest(BaseModel):
    """A conversation to go on with; the answer is greedy unless `temperature` or `top_p` asks for more."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    messages: list[Message]
    max_tokens: int | None = Field(None, description="Longest answer in tokens; 128 if none is given.")
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None
    visual_tokens: int | None = Field(
        None, description="Visual tokens of one image left in the end; null answers without pruning."
    )
    n: Any = _neutral(1)
    frequency_penalty: Any = _neutral(0)
    presence_penalty: Any = _neutral(0)
    logprobs: Any = _neutral(False)

    @field_validator("*")
    @classmethod
    def _check_neutral(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[str(info.field_name)].json_schema_extra
        if isinstance(extra, dict) and value not in (allowed := list(extra["enum"])):  # type: ignore[arg-type]
            raise ValueError(", ".join(map(json.dumps, allowed[:-1])))
        return value

    def for_handler(self) -> dict[str, Any]:
        """Return the request as the endpoint handler takes it."""
        parameters: dict[str, Any] = {}
        if "visual_tokens" in self.model_fields_set:
            parameters["visual_tokens"] = self.visual_tokens  # null has a meaning: no pruning
        longest = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if longest is not None:
            parameters["max_new_tokens"] = longest
        if self.temperature or (self.temperature is None and self.top_p is not None):
            sampling = self.model_dump(include={"temperature", "top_p", "seed"}, exclude_none=True)
            parameters |= {"do_sample": True, **sampling}
        messages = [message.model_dump(exclude_unset=True) for message in self.messages]
        return {"inputs": {"messages": messages}, "parameters": parameters}


class Usage(BaseModel):
    """What a request cost in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Pruning(BaseModel):
    """What is left of each picture, and what the answer took."""

    visual_tokens: list[int]
    layer_averaged_tokens: float
    seconds: float


class AnswerMessage(BaseModel):
    """The model's words."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """An answer and its cost."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    ivtp: Pruning

    @classmethod
    def of(cls, answer: dict[str, Any], model: str, stop: str | list[str] | None) -> "Completion":
        """Make an answer of the endpoint handler's, cut where the first of the `stop` texts begins."""
        text, reason = answer["generated_text"], answer["finish_reason"]
        stops = [stop] if isinstance(stop, str) else stop or []
        cut = min((text.find(end) for end in stops if end and end in text), default=None)
        if cut is not None:
            text, reason = text[:cut], "stop"
        prompt, new = answer["prompt_tokens"], answer["generated_tokens"]
        return cls(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model,
            choices=[Choice(message=AnswerMessage(content=text), finish_reason=reason)],
            usage=Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new),
            ivtp=Pruning(**{name: answer[name] for name in Pruning.model_fields}),
        )

    def events(self) -> list[str]:
        """Return the answer as server-sent events, in one piece."""
        shared = self.model_dump(include={"id", "created", "model"}) | {"object": "chat.completion.chunk"}
        choice = self.choices[0]
        deltas: list[tuple[dict[str, str], str | None]] = [
            (choice.message.model_dump(), None),
            ({}, choice.finish_reason),
        ]
        chunks = [
            shared | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} for delta, reason in deltas
        ]
        return [f"data: {data}\n\n" for data in (*map(json.dumps, chunks), "[DONE]")]


class Model(BaseModel):
    """A model that answers here."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "ivtp-llava"


class ModelList(BaseModel):
    """All models that answer here."""

    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """OpenAI's form of an error."""

    error: Error


def explain_errors(errors: Sequence[Any]) -> str:
    """Say in one line which value of a request is wrong, and what is allowed."""
    if unknown := sorted(str(error["loc"][-1]) for error in errors if error["type"] == "extra_forbidden"):
        return f"unknown field(s) {', '.join(unknown)[:200]}; allowed: {', '.join(ChatRequest.model_fields)}"
    # Of the forms that a value may have, the one that fits furthest is the one that was meant.
    error = max(errors, key=lambda error: len(error["loc"]))
    place = ".".join(str(step) for step in error["loc"][1:] if step != "body") or "the request"
    if error["type"] == "json_invalid":
        return f"the request is not JSON: {error.get('ctx', {}).get('error', error['msg'])}"
    if isinstance(error["input"], bytes):
        return "the request has no Content-Type: application/json"
    if error["type"] == "missing":
        return f"{place} is missing"
    allowed = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{place}={json.dumps(error['input'], default=repr)[:40]}; allowed: {allowed}"
