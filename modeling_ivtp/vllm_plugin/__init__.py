"""Serving on vLLM: the plug-in that `vllm.general_plugins` names, so that vLLM prunes an IVTP-LLaVA by itself.

vLLM's layers have as many tokens of a request each, so the second stage chooses ahead of the decoder, as
`decoder_choice="ahead"` does in transformers. The kept tokens stand at their original positions.
"""

from typing import Any

SUPPORTED = (">=0.32", "<0.33")
"""The versions of vLLM whose inner interfaces the plug-in was written for."""

ARCHITECTURE = "IVTPLlavaForConditionalGeneration"


def check_version(version: str) -> None:
    """Refuse a vLLM of another version.

    Raises
    ------
    ImportError
        The message names the version and the supported range.
    """
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(",".join(SUPPORTED), prereleases=True).contains(version):
        raise ImportError(
            f"vLLM {version} is installed, and IVTP-LLaVA's plug-in supports vLLM {','.join(SUPPORTED)}: install "
            "such a version, or serve with `ivtp serve`."
        )


def register() -> None:
    """Make IVTP-LLaVA known to vLLM; vLLM calls it in every process, and a second call changes nothing.

    With a vLLM of another version only the architecture's name is made known, so that other models are served as ever,
    and serving an IVTP-LLaVA fails with the supported range.
    """
    import vllm
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.serving:{ARCHITECTURE}")
    try:
        check_version(vllm.__version__)
    except ImportError as error:
        from vllm.logger import init_logger

        init_logger(__name__).warning("%s", error)
        return
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from .served_config import ServedConfig

    _CONFIG_REGISTRY[ServedConfig.model_type] = ServedConfig
    _move_positions()


def _move_positions() -> None:
    """Let vLLM's runner for CPUs ask models where pruned tokens stand, as its runners for GPUs do."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load: Any = CPUModelRunner.load_model
    if getattr(load, "moves_positions", False):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        if getattr(self.get_model(), "moves_positions", False):
            self.is_multimodal_pruning_enabled = True

    load_model.moves_positions = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model
