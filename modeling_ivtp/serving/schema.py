"""OpenAI's chat completions as far as `ivtp serve` takes and gives them."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from .batching import cut_at

MAX_STOPS = 4
LONGEST_STOP = 256
"""Characters of a stop; every token of an answer is compared with the beginnings of all."""


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


class StreamOptions(BaseModel):
    """Choices about a stream beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


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
    stop: str | list[str] | None = Field(
        None, description=f"Up to {MAX_STOPS} texts of at most {LONGEST_STOP} characters, before which the answer ends."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    visual_tokens: int | None = Field(
        None, description="Visual tokens of one image left in the end; null answers without pruning."
    )
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    n: Any = _neutral(1)
    frequency_penalty: Any = _neutral(0)
    presence_penalty: Any = _neutral(0)
    logprobs: Any = _neutral(False)
    top_logprobs: Any = _neutral(0)
    logit_bias: Any = _neutral({})
    response_format: Any = _neutral({"type": "text"})
    tools: Any = _neutral([])
    tool_choice: Any = _neutral("none", "auto")
    functions: Any = _neutral([])
    function_call: Any = _neutral("none", "auto")
    modalities: Any = _neutral(["text"])
    service_tier: Any = _neutral("auto", "default")
    store: Any = _neutral(False)

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, values: Any) -> Any:
        """Leave out fields that are null and unknown here: some clients send every field that they know."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name in cls.model_fields}

    @field_validator("*")
    @classmethod
    def _check_neutral(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[str(info.field_name)].json_schema_extra
        if isinstance(extra, dict) and value not in (allowed := list(extra["enum"])):  # type: ignore[arg-type]
            raise ValueError(", ".join(map(json.dumps, allowed[:-1])))
        return value

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = value if isinstance(value, list) else [value or ""]
        if len(stops) > MAX_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
            raise ValueError(f"up to {MAX_STOPS} texts of at most {LONGEST_STOP} characters")
        return value

    @property
    def stops(self) -> list[str]:
        """The texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def for_handler(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the request and its parameters, as the endpoint handler's `read` takes them."""
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
        return {"messages": messages}, parameters


class Usage(BaseModel):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Pruning(BaseModel):
    """Tokens left of each picture, and cost of the answer."""

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


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


class Completion(BaseModel):
    """An answer and its cost."""

    id: str = Field(default_factory=_new_id)
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage
    ivtp: Pruning

    @classmethod
    def of(cls, answer: dict[str, Any], model: str, stops: Sequence[str]) -> "Completion":
        """Make a completion of the endpoint handler's answer, cut before the first of `stops`."""
        text, cut = cut_at(answer["generated_text"], stops)
        prompt, new = answer["prompt_tokens"], answer["generated_tokens"]
        reason: Any = "stop" if cut else answer["finish_reason"]
        return cls(
            model=model,
            choices=[Choice(message=AnswerMessage(content=text), finish_reason=reason)],
            usage=Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new),
            ivtp=Pruning(**{name: answer[name] for name in Pruning.model_fields}),
        )


class Delta(BaseModel):
    """The next piece of the model's words."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The one answer, in pieces."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None


class Chunk(BaseModel):
    """A piece of an answer; the last ones have no words, but its end, its cost and what was kept of the pictures."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    ivtp: Pruning | None = None


class Chunks:
    """Writes the chunks of one answer as server-sent events.

    Parameters
    ----------
    model : str
    include_usage : bool
        Whether the last chunk tells the cost in tokens.
    """

    def __init__(self, model: str, include_usage: bool) -> None:
        self._shared: dict[str, Any] = {
            "id": _new_id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": model
        }  # fmt: skip
        if include_usage:
            self._shared["usage"] = None

    def delta(self, **delta: Any) -> str:
        """Write a piece of the answer."""
        return self._event([ChunkChoice(index=0, delta=Delta(**delta), finish_reason=None)])

    def end(self, completion: Completion) -> str:
        """Write how the answer ended, and its cost if it is asked for."""
        choice = ChunkChoice(index=0, delta=Delta(), finish_reason=completion.choices[0].finish_reason)
        events = self._event([choice], ivtp=completion.ivtp)
        if "usage" in self._shared:
            events += self._event([], usage=completion.usage)
        return f"{events}data: [DONE]\n\n"

    def _event(self, choices: list[ChunkChoice], **more: Any) -> str:
        chunk = Chunk(**{**self._shared, "choices": choices, **more})
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


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
