"""Is this tree fit to be released? Builds it, installs it into a clean environment, tries it there.

    python scripts/release_check.py [--keep]

Builds sdist and wheel, the wheel from the sdist, so that nothing is missing there. Installs the
wheel with the extras that the README needs into a new environment outside of this tree, and runs
there the README's code (with the stand-ins of ``tests/test_docs.py``, for it would download
weights), and the command line from a folder of pictures to a verdict and a page. pip gets its
packages from wherever it is configured to. The version has to be the same everywhere it stands.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What the README and its tests need beside the library itself.
EXTRAS = "cli,plot,report"
BESIDE = ("pytest", "pytest-timeout", "hypothesis", "torchvision", "scikit-learn", "build")
#: Bytes of the wheel, at most.
MOST = 1_000_000
#: Files that an sdist has to hold, so that others can build and test from it.
IN_SDIST = (
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "CITATION.cff",
    "Makefile",
    "nad_attr/py.typed",
    "tests/test_docs.py",
    "docs/conf.py",
)


BEGAN = time.monotonic()


def say(text: str) -> None:
    """One step, and the seconds so far."""
    print(f"-- {time.monotonic() - BEGAN:4.0f} s: {text}", flush=True)


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command; an error ends the check."""
    print("   $", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def versions() -> dict[str, str]:
    """The version as it stands in each file."""
    found = {}
    for path, pattern in {
        "nad_attr/_version.py": r'__version__ = "([^"]+)"',
        "CITATION.cff": r"^version: (\S+)",
    }.items():
        match = re.search(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        found[path] = match[1] if match else "none"
    return found


def check_archives(folder: Path) -> tuple[Path, Path]:
    """The sdist and the wheel, with everything in them that has to be."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in IN_SDIST if name not in names]
    if missing:
        raise SystemExit(f"the sdist lacks {', '.join(missing)}")
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nad_attr").rglob("*.py")}
    lacking = sorted(modules - set(inside))
    if lacking:
        raise SystemExit(f"the wheel lacks {', '.join(lacking)}")
    strangers = [n for n in inside if not re.match(r"nad_attr(/|-[^/]+\.dist-info/)", n)]
    if strangers:
        raise SystemExit(f"the wheel holds {', '.join(strangers[:5])}")
    if wheel.stat().st_size >= MOST:
        raise SystemExit(f"the wheel has {wheel.stat().st_size:,} bytes, {MOST:,} and more")
    return sdist, wheel


#: Makes a folder of pictures as a user has it: a class a folder, sizes that differ.
PICTURES = """
import pathlib, random
from PIL import Image
random.seed(0)
for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
    folder = pathlib.Path("photos", str(label))
    folder.mkdir(parents=True)
    for i in range(12):
        picture = Image.new("RGB", (40 + i, 48), tuple(c + random.randint(-50, 50) for c in colour))
        picture.paste((0, 0, 0), (i, i, i + 12, i + 9))
        picture.save(folder / f"{i}.png")
"""


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep the folder of the check")
    options = parser.parse_args()

    say("the version is the same everywhere")
    found = versions()
    if len(set(found.values())) != 1:
        raise SystemExit(f"versions differ: {found}")

    folder = Path(tempfile.mkdtemp(prefix="nad-attr-release-"))
    try:
        say(f"a clean environment in {folder}")
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, "build", cwd=folder)

        say("sdist, and the wheel from it")
        run(python, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        sdist, wheel = check_archives(folder / "dist")

        say("the wheel, installed")
        run(*pip, f"{wheel}[{EXTRAS}]", *BESIDE, cwd=folder)
        run(python, "-m", "pip", "check", cwd=folder)

        say("the README's code, away from this tree")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder / "sdist", filter="data")
        (unpacked,) = (folder / "sdist").iterdir()
        # What is tried is the wheel.
        shutil.rmtree(unpacked / "nad_attr")
        run(
            *(python, "-m", "pytest", "-q", "--override-ini=addopts=", "--import-mode=importlib"),
            *("tests/test_docs.py", "-k", "README"),
            cwd=unpacked,
        )
        where = "import nad_attr, pathlib; print(pathlib.Path(nad_attr.__file__).parent)"
        run(python, "-c", where, cwd=unpacked)

        say("the command line")
        script = python.with_name("nad-attr")
        run(script, "--version", cwd=folder)
        run(script, "sites", "--model", "torchvision:resnet18:none", cwd=folder)

        say("from a folder of pictures to a verdict and a page")
        run(python, "-c", PICTURES, cwd=folder)
        small = ("--resize", "32", "--crop", "32", "--quick")
        model = ("--model", "torchvision:resnet18:none", "--data", "photos")
        run(script, "explain", *model, *small, "--out", "report.html", cwd=folder)
        if "Ten questions" not in (folder / "report.html").read_text(encoding="utf-8"):
            raise SystemExit("the page lacks its questions")
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    say(f"fit to be released: {sdist.name}, {wheel.name}")


if __name__ == "__main__":
    main()
