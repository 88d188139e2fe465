"""Lets a torchvision that was built for GPUs be imported beside vLLM's torch for CPUs.

It registers implementations of two operators that this torch does not define. They are never called here.
`make vllm-env` puts this file into the environment, whose every process imports it as it starts.
"""

import importlib.abc
import sys


class _DefineOperators(importlib.abc.MetaPathFinder):
    """Defines the operators at the first import of torchvision, so that other processes do not import torch."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            type(self).library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(operator + signature)


sys.meta_path.insert(0, _DefineOperators())
