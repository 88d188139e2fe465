"""What 0.1.0 called things works for one release, and a FutureWarning names the new place."""

import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch

import modeling_ivtp
from modeling_ivtp import methods
from modeling_ivtp._moved import ATTRIBUTES, MODULES, NAMES, NEEDS
from modeling_ivtp.methods.selecting import best, patch_keys
from modeling_ivtp.model.pruner import (
    Choice,
    DecoderStep,
    FeatureStep,
    IVTPPruner,
    Needs,
    Pruner,
    PrunerWrapper,
    TowerStep,
)
from modeling_ivtp.model.schedule import Group, PruningPlan
from tests.support.tiny import prompt, tiny_model

PUBLIC = {
    "attention_maps": "weighted_attention averaged_attention map_heads add_heads attend_with_map",
    "cache_name": "CACHE one_cache cache_of",
    "checkpoint_ivtp": "register_weight_names",
    "configuration_ivtp": "CHOICES AUTO_MAP is_whole IVTPPruningConfig IVTPLlavaConfig",
    "cuda_graphs": "AUTOMATIC_SHARE Graphs",
    "fused_attention": "is_served fused_weighted_attention",
    "generation_ivtp": "PrunedGeneration take_images",
    "graph_recording": "Packing SharedMemory Recorded",
    "group_rollout": "AttentionRecord GroupScores reference_row roll_down rollout aggregate importance decide",
    "hub.answering": "Answer load_model set_budget check_device prepare explain kv_bytes answer compare answer_text",
    "hub.cards": "GENERIC card_names card_images sample preview render",
    "hub.clip_bpe": "clip_tokenizer_from_open_clip",
    "hub.clip_checkpoint": "ClipText load_clip_text",
    "hub.console": "quiet progress_bar steps_bar",
    "hub.convert": "RECIPE_FILE Conversion convert",
    "hub.folder": "new_folder check_target human_bytes byte_count",
    "hub.fresh_check": "HIDE check_fresh",
    "hub.images": "MAX_PIXELS MAX_DOWNLOAD FORMATS load_image",
    "hub.llava_source": "MODEL_TYPES read_config meta_model",
    "hub.push": "Push push",
    "hub.recipes": "Recipe recipe_names load_recipe",
    "hub.server": "load_handler build",
    "hub.sources": "HubOptions is_hub_id local_folder open_checkpoint",
    "hub.staging": "Repository stage",
    "hub.stock": "export_stock",
    "hub.tables": "markdown_table",
    "hub.weights": "TensorInfo Checkpoint write_safetensors",
    "instruction_cache": "InstructionCache",
    "ivtp_policy": "IVTPPolicy",
    "key_layout": "KeyLayout",
    "language_ivtp": "VisualPrompt GroupedLlamaModel GroupedMistralModel GroupedQwen2Model DECODERS",
    "layer_watch": "LayerWatch",
    "modeling_ivtp": "IVTPImageFeatures IVTPLlavaModelOutputWithPast IVTPLlavaPreTrainedModel IVTPLlavaModel "
    "IVTPLlavaForConditionalGeneration",
    "observed_attention": "Observation",
    "processing_ivtp": "IVTPLlavaProcessor",
    "prompt_reading": "PromptReading read_prompt",
    "prompt_replay": "RECORDINGS",
    "pruned_cache": "PrunedDynamicLayer PrunedStaticLayer is_pruned layer_segments LayerRun layer_runs",
    "pruning_policy": "STAGES Choice TowerMoment FeatureMoment PromptMoment DecoderMoment Policy Wrapped",
    "pruning_trace": "GroupTrace TokenTrace ImageTrace PruningTrace",
    "role_markers": "KNOWN_FORMATS user_turns template_markers",
    "text_relevance": "overlapping_spans token_relevance map_relevance text_similarity key_tokens pseudo_cls",
    "token_budget": "Group PruningPlan geometric_schedule grouped plan_pruning",
    "trace_recorder": "TraceRecorder",
    "vision_ivtp": "PrunedVisionOutput GroupedCLIPAttention CLIPEncoderLayer GroupedCLIPVisionModel",
    "visual_sequence": "RowCounts VisualSequence count_rows locate_images",
}
"""Modules of 0.1.0 below the package, and their public names."""


def fresh(name: str) -> Any:
    """A module by its old name, as if it had not been imported yet."""
    sys.modules.pop(name, None)
    return import_module(name)


@pytest.mark.parametrize("old", sorted(MODULES))
def test_an_old_module_imports_and_names_the_new_one(old: str) -> None:
    new = "checkpoints, files, publish and serving" if old == "hub" else f"modeling_ivtp.{MODULES[old]};"
    with pytest.warns(FutureWarning) as caught:
        fresh(f"modeling_ivtp.{old}")
    message = str(caught[-1].message)
    assert message.startswith(f"modeling_ivtp.{old} is now ")
    assert new in message
    assert "until version 0.3" in message


@pytest.mark.parametrize("old", sorted(PUBLIC))
def test_an_old_module_holds_what_it_held(old: str) -> None:
    module = fresh(f"modeling_ivtp.{old}")
    new = import_module(f"modeling_ivtp.{MODULES[old]}")
    for name in PUBLIC[old].split():
        if name not in NAMES:
            assert getattr(module, name) is getattr(new, name)
            continue
        path, _, target = NAMES[name].rpartition(".")
        place = import_module(f"modeling_ivtp.{path}") if path else new
        with pytest.warns(FutureWarning, match=rf"{old}\.{name} is now {place.__name__}\.{target};"):
            found = getattr(module, name)
        assert found is getattr(place, target) or (name == "Policy" and issubclass(found, Pruner))
    with pytest.raises(AttributeError):
        module.nowhere  # noqa: B018


@pytest.mark.parametrize(
    ("module", "old"), [("method", "behind"), ("selecting", "behind_images"), ("selecting", "together")]
)
def test_a_module_that_stayed_knows_its_old_names(module: str, old: str) -> None:
    place = import_module(f"modeling_ivtp.methods.{module}")
    with pytest.warns(
        FutureWarning, match=rf"methods\.{module}\.{old} is now modeling_ivtp\.methods\.{module}\.{NAMES[old]};"
    ):
        found = getattr(place, old)
    assert found is getattr(place, NAMES[old])
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        place.nowhere  # noqa: B018


def test_the_warning_points_at_the_line_with_the_old_name() -> None:
    sys.modules.pop("modeling_ivtp.token_budget", None)
    with pytest.warns(FutureWarning) as module:
        from modeling_ivtp.token_budget import PruningPlan as Old
    with pytest.warns(FutureWarning) as name:
        from modeling_ivtp.pruning_policy import TowerMoment
    assert {warning.filename for warning in [*module, *name]} == {__file__}
    assert Old is PruningPlan
    assert TowerMoment is TowerStep


def test_an_old_module_is_an_attribute_of_the_package() -> None:
    vars(modeling_ivtp).pop("token_budget", None)
    assert modeling_ivtp.token_budget.PruningPlan is PruningPlan
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        modeling_ivtp.nowhere  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        import_module("modeling_ivtp.nowhere")


@pytest.mark.subprocess
def test_the_package_does_not_use_old_names_itself() -> None:
    modules = "modeling_ivtp.cli, modeling_ivtp.methods, modeling_ivtp.flops, modeling_ivtp.speed.bench"
    modules += ", modeling_ivtp.publish.push, modeling_ivtp.serving.answering, modeling_ivtp.batch"
    told = "import warnings; warnings.filterwarnings('error', 'modeling_ivtp|.*the old name works', FutureWarning); "
    done = subprocess.run([sys.executable, "-c", f"{told}import {modules}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


OLD_EXAMPLE = '''
from dataclasses import dataclass
from typing import Any, ClassVar

from modeling_ivtp.methods import Method
from modeling_ivtp.methods.selecting import best
from modeling_ivtp.pruning_policy import Choice, FeatureMoment
from modeling_ivtp.token_budget import PruningPlan


@dataclass(frozen=True)
class LargestNorm(Method):
    """Keeps the features with the largest norm."""

    name: ClassVar[str] = "largest_norm"
    stages: ClassVar[tuple[str, ...]] = ("features",)

    def layout(self, config: Any, patches: int) -> PruningPlan:
        return PruningPlan(patches, features=self.keep)

    def in_features(self, moment: FeatureMoment) -> Choice:
        return best(moment.features.norm(dim=-1), moment.keep)
'''
"""The example of methods/README.md in 0.1.0, word for word."""


@dataclass(frozen=True)
class LargestNorm(methods.Method):
    name: ClassVar[str] = "largest_norm"
    stages: ClassVar[tuple[str, ...]] = ("features",)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        return PruningPlan(patches, features=self.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        return best(step.features.norm(dim=-1), step.keep)


def logits(method: methods.Method) -> torch.Tensor:
    model = tiny_model()
    with torch.no_grad(), method(model):
        return model(**prompt([[3, "image", 7], [2, "image", 4, "image", 3]])).logits


def test_the_documented_example_of_a_method_still_prunes() -> None:
    names: dict[str, Any] = {"__name__": "example"}
    with pytest.warns(FutureWarning, match=r"LargestNorm\.layout is now LargestNorm\.schedule"):
        exec(compile(OLD_EXAMPLE, "example.py", "exec"), names)
    assert torch.equal(logits(names["LargestNorm"](4)), logits(LargestNorm(4)))


def test_needs_may_be_said_as_attributes() -> None:
    def key_norm(step: FeatureStep) -> torch.Tensor:
        return patch_keys(step.records[-2]).norm(dim=(1, 3))

    @dataclass(frozen=True)
    class New(LargestNorm):
        requires: ClassVar[Needs] = Needs(recorded_layers=(-2,), all_projected=True)

        def in_features(self, step: FeatureStep) -> Choice:
            return best(key_norm(step), step.keep)

    with pytest.warns(FutureWarning, match=r"Needs\(all_projected=\.\.\., recorded_layers=\.\.\.\)"):

        @dataclass(frozen=True)
        class Old(LargestNorm):
            watched_layers: ClassVar[tuple[int, ...]] = (-2,)
            projects_all = True

            def in_features(self, step: FeatureStep) -> Choice:
                return best(key_norm(step), step.keep)

    assert Old(4).needs == New(4).needs == Needs(recorded_layers=(-2,), all_projected=True)
    assert Old(4, positions="compact").needs.compact_positions
    assert torch.equal(logits(Old(4)), logits(New(4)))


def test_a_property_may_say_a_need_and_a_subclass_inherits_it() -> None:
    options = tiny_model().config.pruning

    class Old(methods.Method):
        observes = True

        @property
        def reading(self) -> Any:
            return options

    @dataclass(frozen=True)
    class Heir(Old):
        name: ClassVar[str] = "heir"

    assert Heir(4).needs == Needs(pseudo_cls=True, options=options)


def test_a_policy_of_old_is_a_pruner() -> None:
    from modeling_ivtp.pruning_policy import Policy

    class Mine(Policy):
        proportional = True

        def plan(self, config: Any, patches: int) -> PruningPlan:
            return PruningPlan(patches, tower=(Group(1, 1, 4),))

    assert isinstance(Mine(), Pruner)
    assert Mine().needs == Needs(proportional_attention=True)
    assert Policy().needs == Needs()


def test_steps_and_sequences_answer_to_the_old_names_of_their_attributes() -> None:
    asked = []

    @dataclass(frozen=True)
    class Watching(methods.FastV):
        def in_decoder(self, moment: DecoderStep) -> Choice:
            sequence = moment.sequence
            assert moment.watches is moment.decoder_records
            assert sequence.present is sequence.image_present
            assert torch.equal(sequence.there, sequence.token_present)
            assert (sequence.asked, sequence.reach) == (sequence.prompt_end, sequence.image_end)
            row = sequence.rows[0]
            assert (row.behind, row.tail, sequence.tail) == (row.text_after, row.trailing_text, sequence.trailing_text)
            asked.append(moment)
            return super().in_decoder(moment)

    with pytest.warns(FutureWarning) as caught:
        logits(Watching(4, layer=2))
    assert len(asked) == 1
    messages = {str(warning.message).partition(";")[0] for warning in caught}
    told = {f"{owner}.{old} is now {new}" for (_, owner, old), new in ATTRIBUTES.items()}
    assert messages == told - {"PrunerWrapper.policy is now pruner"}
    pruner = IVTPPruner(tiny_model().config.pruning)
    assert PrunerWrapper(pruner).policy is pruner


@pytest.mark.slow
def test_a_method_of_today_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)

        @dataclass(frozen=True)
        class Today(LargestNorm):
            requires: ClassVar[Needs] = Needs(all_projected=True)

        logits(Today(4))
    assert set(NEEDS.values()) <= set(Needs.__dataclass_fields__)  # later needs have no old name
