"""Everything is in pyproject.toml but this: what the package reads beside its modules travels inside it."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    "configuration",
    "hub_cards",
    "examples/images/astronaut.jpg",
    "examples/images/coffee.jpg",
    "examples/images/LICENSES.md",
    "LICENSE",
)


class WithData(build_py):
    """Copies shapes, recipes, model cards and sample images beside the modules that are built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            source, target = Path(__file__).parent / name, Path(self.build_lib) / "modeling_ivtp" / "shipped" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": WithData})
