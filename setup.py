"""Everything is in pyproject.toml but this: published shapes lie in `configuration/`, and travel inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithShapes(build_py):
    """Copies `configuration/shapes` beside the modules that are built."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shapes = Path(__file__).parent / "configuration" / "shapes"
            shutil.copytree(shapes, Path(self.build_lib) / "modeling_ivtp" / "shapes", dirs_exist_ok=True)


setup(cmdclass={"build_py": WithShapes})
