"""transformers' own tests of LLaVA, pointed at our classes: they run where `TRANSFORMERS_CHECKOUT` names a checkout.

The test files are not in the package transformers, so a checkout of the installed version is needed:

    TRANSFORMERS_CHECKOUT=../transformers python -m pytest tests/model/test_transformers_suite.py

With pruning off, every test is to pass. With pruning on, `UNDER_PRUNING` names those that do not apply, and why a user
would accept it. Tests of pipelines are left out: they fetch checkpoints that exist for transformers' own classes only.
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration, LlavaModel

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration
from modeling_ivtp.model.modeling_ivtp import IVTPLlavaModel

CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")
PACKAGE = "tests_of_transformers"
SUITE = "models.llava.test_modeling_llava"
STOCK = {IVTPLlavaModel: LlavaModel, IVTPLlavaForConditionalGeneration: LlavaForConditionalGeneration}
LAYERS_DIFFER = (
    "asks for attention maps, whose sizes differ from layer to layer under pruning: the call raises ValueError, which "
    "names `explain` and `pruning(enabled=False)` instead"
)
UNDER_PRUNING = {
    "test_attention_outputs": LAYERS_DIFFER,
    "test_capture_outputs_decorator": LAYERS_DIFFER,
    "test_get_image_features_attentions": LAYERS_DIFFER,
    "test_multimodal_outputs_are_returned": LAYERS_DIFFER,
    "test_retain_grad_hidden_states_attentions": LAYERS_DIFFER,
    "test_model_outputs_equivalence": "subtracts every output, and `kept_tokens` is a mask; tuples and dictionaries "
    "agree in test_user_calls.py",
}

# Deprecations are what some of the tests look for; the configuration of ours ignores them.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("always::FutureWarning")]


def _load(checkout: str) -> ModuleType:
    """Import LLaVA's test file under a name of its own, since our tests are a package `tests`, too."""
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(Path(checkout) / "tests")]
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{SUITE}")


if CHECKOUT is None:
    pytest.skip("TRANSFORMERS_CHECKOUT names no checkout of transformers", allow_module_level=True)
if not (Path(CHECKOUT) / "tests" / "models" / "llava" / "test_modeling_llava.py").is_file():
    pytest.skip(f"TRANSFORMERS_CHECKOUT={CHECKOUT} has no tests of LLaVA", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
suite = _load(CHECKOUT)


class _OurClasses(suite.LlavaForConditionalGenerationModelTest):  # type: ignore[name-defined, misc]
    """The suite with our classes and configuration."""

    __test__ = False
    pruning: dict[str, Any]
    all_model_classes = (IVTPLlavaModel, IVTPLlavaForConditionalGeneration)
    pipeline_model_mapping: dict[str, Any] = {}  # noqa: RUF012

    def setUp(self) -> None:
        super().setUp()
        stock_config = self.model_tester.get_config

        def our_config() -> IVTPLlavaConfig:
            values = stock_config().to_dict()
            for name in ("model_type", "transformers_version", "architectures"):
                values.pop(name, None)
            return IVTPLlavaConfig(**values, pruning=self.pruning)

        self.model_tester.get_config = our_config
        self.config_tester.config_class = IVTPLlavaConfig
        if "test_training" in self._testMethodName:
            # The suite knows by transformers' own tables that a bare model computes no loss.
            self.all_model_classes = (IVTPLlavaForConditionalGeneration,)

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> Any:
        """Prepare the inputs of the stock class: the suite finds a class's inputs by its name."""
        return super()._prepare_for_class(inputs_dict, STOCK.get(model_class, model_class), return_labels)


class TestPruningOff(_OurClasses):
    __test__ = True
    pruning = {"enabled": False}  # noqa: RUF012


class TestPruningOn(_OurClasses):
    __test__ = True
    pruning = {"visual_tokens": 4, "tower_tokens": 9, "layers_per_group": 1, "decoder_layers": 2}  # noqa: RUF012


for name, reason in UNDER_PRUNING.items():
    if hasattr(TestPruningOn, name):
        setattr(TestPruningOn, name, unittest.skip(f"under pruning it {reason}")(getattr(TestPruningOn, name)))
