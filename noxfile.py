"""The tests on the oldest and newest Python, torch, captum and zennit: ``make test-matrix``.

    nox                       every environment
    nox -s "tests(oldest)"    one of them; what stands after -- goes to pytest
    nox -s wheel              the wheel, built, installed into a clean environment and tried there
    nox --envdir FOLDER -R    elsewhere; -R keeps an environment that is there already

Each environment takes about 6 GB; nox finds the interpreters on the PATH (or, with
``--download-python auto``, has uv fetch them). What passed when stands in docs/install.md.
"""

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.needs_version = ">=2024.4"

#: Python, name, requirements. Sensible pairs, for the whole product would be 48: each Python, each
#: captum and each zennit at least once, the oldest and newest torch twice. zennit 0.5.1 says
#: that it serves Python below 3.11.11, zennit 1.0 from there on.
MATRIX = (
    ("3.10", "oldest", ("torch==2.4.0", "captum==0.7.0", "zennit==0.5.1")),
    ("3.11", "newest-torch", ("torch>=2.14", "captum==0.8.0", "zennit")),
    ("3.12", "oldest-torch", ("torch==2.4.1", "captum==0.8.0", "zennit==1.0.0")),
    ("3.13", "newest", ("torch>=2.14", "captum>=0.9", "zennit>=1.0")),
)
SHOWN = ("torch", "torchvision", "captum", "zennit", "numpy", "h5py", "pandas")


@nox.session
@nox.parametrize(
    "python,requirements",
    [(python, requirements) for python, _, requirements in MATRIX],
    ids=[name for _, name, _ in MATRIX],
)
def tests(session: nox.Session, requirements: tuple[str, ...]) -> None:
    """All tests but the slow ones, and the examples of the docstrings."""
    needed = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["test"]
    if "captum==0.8.0" in requirements:  # it needs numpy < 2, and virelay numpy 2
        needed = [one for one in needed if not one.startswith("virelay")]
    needed = [one.replace("nad-attr[", ".[") for one in needed]
    if any(one.startswith("torch==2.4") for one in requirements):  # the extra needs torch 2.6
        needed = [one.replace("export,", "") for one in needed]
    session.install("--editable", needed[0], *needed[1:], *requirements)
    session.run(
        "python",
        "-c",
        "import platform, importlib.metadata as m; print('Python', platform.python_version(), "
        f"*(f'{{n}} {{m.version(n)}}' for n in {SHOWN!r}), sep=', ')",
    )
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    session.run("pytest", "-m", "not slow", *session.posargs, env=environment)


@nox.session(python=["3.10", "3.13"])
def wheel(session: nox.Session) -> None:
    """What ``make release-check`` does: the wheel, the README's code and a verdict, elsewhere."""
    session.run("python", "scripts/release_check.py", *session.posargs)
