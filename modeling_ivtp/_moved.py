"""Old names: what version 0.1.0 called things works for one release, warns, and names the new place.

Version 0.3 deletes this file and the few lines that refer to it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOT = __name__.rpartition(".")[0]
_SAME_NAME = {
    "model": "attention_maps checkpoint_ivtp configuration_ivtp cuda_graphs fused_attention generation_ivtp "
    "instruction_cache language_ivtp modeling_ivtp processing_ivtp pruned_cache text_relevance vision_ivtp "
    "visual_sequence",
    "checkpoints": "clip_bpe clip_checkpoint clip_text convert llava_source open_clip_checkpoint recipes shards "
    "sources stock weights",
    "files": "console folder images shipped tables",
    "publish": "cards fresh_check push staging",
    "serving": "answering server",
}
MODULES = {
    f"{'' if folder == 'model' else 'hub.'}{name}": f"{folder}.{name}"
    for folder, names in _SAME_NAME.items()
    for name in names.split()
} | {
    "cache_name": "model.compat",
    "graph_recording": "model.cuda_graphs",
    "group_rollout": "model.rollout",
    "hub": "checkpoints",
    "ivtp_policy": "model.pruner",
    "key_layout": "model.cache_index",
    "layer_watch": "model.rollout",
    "observed_attention": "model.pseudo_cls_attention",
    "own_layers": "model.replayable",
    "prompt_ivtp": "model.prompt",
    "prompt_reading": "model.prompt",
    "prompt_replay": "model.prompt_graphs",
    "pruning_policy": "model.pruner",
    "pruning_trace": "model.trace",
    "role_markers": "model.instruction",
    "token_budget": "model.schedule",
    "trace_figure": "model.trace_plot",
    "trace_picture": "model.trace_plot",
    "trace_recorder": "model.trace",
    "trace_words": "model.trace_plot",
}
"""Modules: old path below the package, new path."""
NAMES = {
    "ClipText": "model.checkpoint_ivtp.ClipText",
    "DecoderMoment": "DecoderStep",
    "FeatureMoment": "FeatureStep",
    "IVTPImageFeatures": "model.outputs.IVTPImageFeatures",
    "IVTPLlavaModelOutputWithPast": "model.outputs.IVTPLlavaModelOutputWithPast",
    "IVTPPolicy": "IVTPPruner",
    "KeyLayout": "CacheIndex",
    "LayerRun": "CacheSpan",
    "LayerWatch": "DecoderAttentionRecord",
    "Observation": "PseudoCLSAttention",
    "Policy": "Pruner",
    "PromptMoment": "PromptStep",
    "PromptReading": "PromptIndex",
    "RECIPE_FILE": "checkpoints.writing.RECIPE_FILE",
    "RECORDINGS": "MAX_GRAPHS",
    "Recorded": "CapturedGraph",
    "TowerMoment": "TowerStep",
    "Wrapped": "PrunerWrapper",
    "behind": "groups_after",
    "behind_images": "after_images",
    "byte_count": "files.sizes.byte_count",
    "human_bytes": "files.sizes.human_bytes",
    "layer_runs": "cache_spans",
    "read_prompt": "index_prompt",
    "take_images": "model.outputs.take_images",
    "together": "join_choices",
}
"""Classes, functions and constants: old name, new name; with a path where they left their module."""
ATTRIBUTES = {
    ("model.pruner", "DecoderStep", "watches"): "decoder_records",
    ("model.pruner", "PrunerWrapper", "policy"): "pruner",
    ("model.visual_sequence", "RowCounts", "behind"): "text_after",
    ("model.visual_sequence", "RowCounts", "tail"): "trailing_text",
    ("model.visual_sequence", "VisualSequence", "asked"): "prompt_end",
    ("model.visual_sequence", "VisualSequence", "present"): "image_present",
    ("model.visual_sequence", "VisualSequence", "reach"): "image_end",
    ("model.visual_sequence", "VisualSequence", "tail"): "trailing_text",
    ("model.visual_sequence", "VisualSequence", "there"): "token_present",
}
"""Attributes that a pruner may read: new module, class, old name; new name."""
NEEDS = {
    "compact": "compact_positions",
    "compares_patches": "patch_embeds",
    "embeds_image": "image_embeds",
    "observes": "pseudo_cls",
    "projects_all": "all_projected",
    "proportional": "proportional_attention",
    "reading": "options",
    "watched_layers": "recorded_layers",
}
"""Attributes by which a pruner said what it needs; fields of `Needs`."""


def _warn(old: str, new: str, level: int = 3) -> None:
    warnings.warn(f"{old} is now {new}; the old name works until version 0.3.", FutureWarning, stacklevel=level)


def old_names(module: str) -> Callable[[str], Any]:
    """Make the `__getattr__` of a module that stayed where it was while names in it changed."""

    def find(name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{NAMES[name]}")
        return getattr(sys.modules[module], NAMES[name])

    return find


def old_module(name: str) -> Any:
    """Import a module by its old name; the `__getattr__` of the package."""
    if name not in MODULES:
        raise AttributeError(f"module {_ROOT!r} has no attribute {name!r}")
    return import_module(f"{_ROOT}.{name}")


def keep_old_attributes() -> None:
    """Let classes answer to the old names of their attributes."""
    for (module, owner, old), new in ATTRIBUTES.items():

        def read(self: Any, old: str = f"{owner}.{old}", new: str = new) -> Any:
            _warn(old, new)
            return getattr(self, new)

        setattr(getattr(import_module(f"{_ROOT}.{module}"), owner), old, property(read))


def accept_old_pruner(cls: Any) -> None:
    """Let a subclass that was written for 0.1.0 say what stays and what it needs in the old way."""
    own = vars(cls)
    if "layout" in own and "schedule" not in own:
        _warn(f"{cls.__name__}.layout", f"{cls.__name__}.schedule", 4)
        cls.schedule = own["layout"]
    if stated := [name for name in NEEDS if name in own]:
        fields = ", ".join(f"{NEEDS[name]}=..." for name in stated)
        _warn(f"{cls.__name__}.{', '.join(stated)}", f"requires = Needs({fields})", 4)
        needs = property(
            lambda self: replace(super(cls, self).needs, **{NEEDS[name]: getattr(self, name) for name in stated})
        )
        cls.needs = needs


def _old_base(pruner: Any) -> type:
    """Make the old base class of pruners from the new one."""

    class Policy(pruner):
        def __init_subclass__(cls, **options: Any) -> None:
            super().__init_subclass__(**options)
            accept_old_pruner(cls)

    return Policy


class _OldModule(ModuleType):
    """A module under its old name; every name in it is read from the new place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the new module's path and spec are not this one's
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, _, new = NAMES.get(name, name).rpartition(".")
        module = f"{_ROOT}.{module or MODULES[self.__name__.removeprefix(f'{_ROOT}.')]}"
        if name in NAMES:
            _warn(f"{self.__name__}.{name}", f"{module}.{new}")
        found = getattr(import_module(module), new)
        return _old_base(found) if name == "Policy" else found


class _OldModules(MetaPathFinder, Loader):
    """Finds modules by their old names, after everything that is installed."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        root, _, old = fullname.partition(".")
        known = root == _ROOT and old in MODULES
        return ModuleSpec(fullname, self, is_package=old == "hub") if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix(f"{_ROOT}.")
        new = "split into checkpoints, files, publish and serving" if old == "hub" else f"{_ROOT}.{MODULES[old]}"
        _warn(module.__name__, new)


sys.meta_path.append(_OldModules())
