"""The public names: import costs, docstrings, signatures, and the boundaries between modules."""

import ast
import importlib
import inspect
import pathlib
import socket
import subprocess
import sys

import pytest

import jaxfisher as jf

PACKAGE = pathlib.Path(jf.__file__).parent
PUBLIC = sorted(name for name, value in vars(jf).items() if not name.startswith("_") and not inspect.ismodule(value))
VALUES = {
    *("AdaptDampingState", "BacktrackKLState", "GeodesicAccelerationState", "QuadraticModelState", "ScaleByFisherState"),
    *("ClippedSum", "Distribution", "Estimate", "FisherCheck", "Form", "LawCheck", "Operator", "Posterior"),
    *("Provenance", "Residuals", "Scores", "SolveInfo", "Spectrum"),
    *("FisherFunction", "LogProb", "Model", "ParamSpec", "Solver", "View"),
}
"""Types that users meet as results, and protocols that a function of theirs may follow."""


def modules_after(statement):
    code = f"{statement}; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_takes_no_extra():
    extras = {"matplotlib", "sklearn", "tqdm", "statsmodels", "scipy.stats"}
    assert not extras & modules_after("import jaxfisher")
    assert "scipy.stats" in modules_after("import jaxfisher, scipy.stats"), "the control: such an import is seen"


def test_importing_and_making_look_for_no_device():
    """Importing initialises no device, since `jax.distributed.initialize` fails after that."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    made = "jf.kfac(), jf.natural_gradient(0.1, 1e-3, radius=0.1), jf.CG(1e-3), jf.Cholesky(), jf.natural_grad(abs, damping=1)"
    after = f"import jax; jax.distributed.initialize('localhost:{port}', 1, 0)"
    for statement, refused in ((f"import jaxfisher as jf; {made}", False), ("import jax; jax.devices()", True)):
        run = subprocess.run([sys.executable, "-c", f"{statement}; {after}"], capture_output=True, text=True, check=False)
        assert ("must be called before" in run.stderr) == refused == (run.returncode != 0), run.stderr


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in VALUES])
def test_every_public_name_says_how_where_from_and_shows_it(name):
    text = inspect.getdoc(getattr(jf, name))
    assert "Reference:" in text and ">>>" in text
    assert "Arguments and errors are those of" in text or "Args:" in text or "Attributes:" in text


PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("[a-z]*/__init__.py"))
"""The public rooms that are imported by their own name."""


@pytest.mark.parametrize("room", PACKAGES)
def test_every_name_of_a_room_says_how_where_from_and_shows_it(room):
    """Every public name has a docstring with its arguments, a reference and an example; that of a value names its parts."""
    module = importlib.import_module(f"jaxfisher.{room}")
    for name, value in vars(module).items():
        if not name.startswith("_") and callable(value):
            text = inspect.getdoc(value)
            told = "Attributes:" in text if inspect.isclass(value) else "Reference:" in text and ">>>" in text
            assert told or (room == "plot" and "Reference:" in module.__doc__), f"{room}.{name}"


@pytest.mark.parametrize("name", sorted(VALUES))
def test_every_value_type_explains_its_members(name):
    cls = getattr(jf, name)
    members = [
        m for key, m in vars(cls).items() if not key.startswith("_") and (inspect.isfunction(m) or isinstance(m, property))
    ]
    assert inspect.getdoc(cls) and all(inspect.getdoc(member) for member in members)


def imports():
    """``file -> the package's files it imports``, at any depth of the syntax tree."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        file = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        graph[file] = {name for name in names if name.startswith("jaxfisher.")}
    return graph


ROOMS = {
    "Distributions": "_distributions",
    "Models": "_model",
    "Divergences": "_divergence",
    "Scores": "_scores _explain",
    "Fishers": "_accumulate _fisher _gauss_newton",
    "Operators": "_operators",
    "Solving": "_cholesky _least_squares _solve _solve_path _system",
    "Natural gradients": "_acceleration _energy_gradient _natural _residuals",
    "Optax": "_transform",
    "Influence": "influence",
    "Continual learning": "continual",
    "Diagnostics": "_check_fisher _diagnostics _estimate",
    "Jobs": "evidence posterior privacy statistics",
    "Extending": "_distributions _fisher _laws _model _operators _provenance _pytree _transform _tree",
    "Names that do not exist": "_absent",
}
"""The headings of the public names by their first words, in reading order, and the rooms whose names stand under each."""


def test_public_names_stand_under_true_headings():
    _, *blocks = (PACKAGE / "__init__.py").read_text().split("\n# ")
    heads = [block.split("\n")[0] for block in blocks]
    assert [next((room for room in ROOMS if head.startswith(room)), head) for head in heads] == list(ROOMS)
    for head, block, rooms in zip(heads, blocks, ROOMS.values(), strict=True):
        found = {node.module.split(".")[1] for node in ast.walk(ast.parse("# " + block)) if isinstance(node, ast.ImportFrom)}
        assert found == set(rooms.split()), head


def test_imports_have_no_cycle():
    graph = imports()
    assert len(graph) > 30
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_nothing_outside_a_room_imports_a_file_inside_the_engine():
    """Other modules import only what the engine's package exports."""
    for file, needs in imports().items():
        if not file.startswith("jaxfisher._engine"):
            inside = [name for name in needs if name.startswith("jaxfisher._engine.")]
            assert not inside, f"{file} imports {inside}; take it from jaxfisher._engine"


def test_only_documented_jax():
    for path in PACKAGE.rglob("*.py"):
        assert "jax._src" not in path.read_text(), path


def class_nodes():
    """Every class of the package."""
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    return [node for node in nodes if isinstance(node, ast.ClassDef)]


def public_methods(node):
    """The public methods and properties that a class defines itself."""
    return {part.name for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")}


def inherited(node, nodes):
    """The public methods and properties that a class inherits from other classes of the package."""
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
    return set().union(*(public_methods(other) | inherited(other, nodes) for other in nodes if other.name in bases))


def test_no_file_is_long_and_no_class_is_wide():
    """A file has at most 450 lines, and a class at most 20 public methods and properties."""
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path
    nodes = class_nodes()
    assert {"Operator", "Form", "Scores"} <= {node.name for node in nodes}
    for node in nodes:
        brought = public_methods(node) - inherited(node, nodes)
        assert len(brought) <= 20, f"{node.name}: {sorted(brought)}"


def test_the_public_type_of_operators_is_final():
    assert jf.Operator.__final__


MADE = {
    "check_fisher(model)": lambda: jf.check_fisher(lambda mu: jf.Normal(mu, 1.0)),
    "sampled_fisher(model)": lambda: jf.sampled_fisher(lambda mu: jf.Normal(mu, 1.0)),
}
"""Functions that a maker returns, and that draw."""


def signatures():
    """The parameters of every public function, of the methods of every public class, and of what makers return."""
    found = {name: getattr(jf, name) for name in PUBLIC} | {name: make() for name, make in MADE.items()}
    for cls in [value for value in found.values() if inspect.isclass(value)]:
        found |= {f"{cls.__name__}.{name}": method for name, method in inspect.getmembers(cls, inspect.isfunction)}
    return {name: list(inspect.signature(f).parameters) for name, f in found.items() if inspect.isfunction(f)}


def test_a_random_key_is_the_second_argument():
    found = {name: parameters for name, parameters in signatures().items() if "key" in parameters}
    assert {"nystrom", "estimate_trace", "sampled_fisher(model)", "Normal.sample"} <= found.keys()
    for name, parameters in found.items():
        assert parameters.index("key") == 1, f"{name}({', '.join(parameters)})"


def test_a_number_of_draws_has_one_name():
    names = {parameter for parameters in signatures().values() for parameter in parameters}
    assert "num_samples" in names and "num_draws" not in names


def test_every_function_of_a_model_is_a_maker():
    """A maker takes a model and options, and returns a function of parameters and data."""
    first = {
        name: parameters
        for name, parameters in signatures().items()
        if parameters[:1] in (["model"], ["log_prob"], ["function"])
    }
    assert {"explain", "check_fisher", "kl", "exact_fisher", "scores", "natural_grad", "training_step"} <= first.keys()
    del first["laplace"]  # a posterior: a value at parameters and data, as an operator is
    for name, parameters in first.items():
        assert not {"params", "data", "inputs"} & set(parameters), name
