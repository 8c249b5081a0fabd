"""The stand-ins are the releases': names, parameters, assertions, choice of kernels, as the releases' sources say.

The sources are parsed, never imported. Where no package index answers, these tests are skipped.
"""

import ast
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_ext import versions
from tests.gpu_rehearsal.pool import STAND_INS
from tests.gpu_rehearsal.releases import (
    classes,
    functions,
    has_name,
    module_file,
    parameters,
    parsed,
    refusals,
    unpacked,
)

pytestmark = pytest.mark.rehearsal

PINNED = versions.release().partners
PACKAGES = ("transformer_engine", "mamba_ssm", "causal_conv1d")
OWN_FILES = {"transformer_engine/stand_in.py"}
# Names of stand-ins that the release has elsewhere or not at all, in Python: the first three come from C++.
OWN_NAMES = {
    "multi_tensor_l2norm", "multi_tensor_scale", "GPU", "CUDNN",
    "before_columns", "after_rows", "unset", "constant", "normal", "Matrix",
}  # fmt: skip
# What the release refuses and a stand-in does not, by file; the reason in words.
ONLY_ON_A_GPU = "there is none"
NOT_REACHED = "the stand-in refuses the whole feature (stand_in.not_here)"
COMPARED = {  # functions whose every refusal the stand-in has, but for those whose text holds one of these
    "transformer_engine/pytorch/module/base.py": {
        "TransformerEngineBaseModule.__init__": {"torch.cuda.is_available": ONLY_ON_A_GPU},
        "TransformerEngineBaseModule.prepare_forward": {"is_cuda": ONLY_ON_A_GPU, "reduce_amax": NOT_REACHED},
        "TransformerEngineBaseModule.set_activation_dtype": {},
        "TransformerEngineBaseModule.set_extra_state": {},
    },
    "transformer_engine/pytorch/module/linear.py": {
        "Linear.__init__": {
            "ub_name": NOT_REACHED, "torch_version": NOT_REACHED, "split": NOT_REACHED, "Split": NOT_REACHED,
            "tensor-parallel processes": "divide asserts the same",
        },
    },
    "transformer_engine/pytorch/module/layernorm_linear.py": {
        "LayerNormLinear.__init__": {
            "ub_name": NOT_REACHED, "torch_version": NOT_REACHED, "split": NOT_REACHED, "Split": NOT_REACHED,
            "tensor-parallel processes": "divide asserts the same",
        },
    },
    "transformer_engine/pytorch/module/grouped_linear.py": {
        "GroupedLinear.__init__": {},
        "GroupedLinear.forward": {"debug mode": NOT_REACHED},
    },
    "transformer_engine/pytorch/module/rmsnorm.py": {"RMSNorm.__init__": {}},
    "transformer_engine/pytorch/module/layernorm.py": {"LayerNorm.__init__": {}},
    "transformer_engine/pytorch/ops/basic/rmsnorm.py": {"RMSNorm.op_forward": {"Input tensor": "said in one line"}},
    "transformer_engine/pytorch/attention/rope.py": {"apply_rotary_pos_emb": {"max_offset": NOT_REACHED,
                                                                              "Unsupported": NOT_REACHED}},
    "transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py": {
        "attn_forward_func_with_cp": {
            "isinstance(cp_group, list)": NOT_REACHED, "qkv_format != 'thd'": NOT_REACHED,
            "softmax_type == 'vanilla'": NOT_REACHED, "enable_mla": NOT_REACHED,
        },
        "AttnFuncWithCPAndKVAllGather.forward": {"": "packed rows are refused before"},
        "AttnFuncWithCPAndQKVOA2A.forward": {
            "v2_3_plus": NOT_REACHED, "FP8": NOT_REACHED, "isinstance(k, q.__class__)": "DotProductAttention does",
        },
    },
    "transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py": {
        "DotProductAttention.__init__": {},
        "DotProductAttention.forward": {
            "is_cuda": ONLY_ON_A_GPU, "rng_states_tracker": NOT_REACHED, "graph_safe": NOT_REACHED,
            "forward_dtype": NOT_REACHED, "self.layer_number": NOT_REACHED, "core_attention_bias": NOT_REACHED,
            "attention_mask is not None": NOT_REACHED,
        },
    },
    "transformer_engine/pytorch/distributed.py": {
        "set_tensor_model_parallel_attributes": {},
        "reduce_scatter_along_first_dim": {"dim_size": "said of the tensor's own shape"},
        "checkpoint": {},
        "CudaRNGStatesTracker.add": {},
        "CudaRNGStatesTracker.fork": {},
    },
    "transformer_engine/pytorch/utils.py": {"ensure_divisibility": {}, "divide": {}},
    "mamba_ssm/ops/triton/ssd_combined.py": {
        "_mamba_chunk_scan_combined_fwd": {"batch == 1": NOT_REACHED},
        "MambaChunkScanCombinedFn.forward": {},
    },
    "mamba_ssm/ops/triton/selective_state_update.py": {
        "selective_state_update": {"state_batch_indices": NOT_REACHED},
    },
    "causal_conv1d/causal_conv1d_interface.py": {
        "CausalConv1dFn.forward": {"x.stride(1) == 1": NOT_REACHED, "final_states_out.stride": NOT_REACHED},
        "causal_conv1d_update": {},
    },
}  # fmt: skip
SHAPES_IN_OTHER_WORDS = {  # files of stand-ins that refuse wrong shapes with sentences of their own
    "transformer_engine/pytorch/ops/basic/layer_norm.py",
    "transformer_engine/pytorch/ops/basic/rmsnorm.py",
    "transformer_engine/pytorch/module/grouped_linear.py",
    "transformer_engine/pytorch/distributed.py",
}


@pytest.fixture(scope="session")
def releases() -> dict[str, Path]:
    """Folders with the sources of the pinned releases, by package."""
    return {
        "transformer_engine": unpacked("transformer_engine", PINNED.transformer_engine, wheel=True),
        "mamba_ssm": unpacked("mamba_ssm", PINNED.mamba_ssm, wheel=False),
        "causal_conv1d": unpacked("causal_conv1d", PINNED.causal_conv1d, wheel=False),
    }


def stand_in_files(package: str) -> list[Path]:
    files = [path.relative_to(STAND_INS) for path in sorted((STAND_INS / package).rglob("*.py"))]
    return [path for path in files if str(path) not in OWN_FILES]


# ---------------------------------------------------------------- the table


def test_the_table_has_the_megatron_core_that_is_installed():
    assert version("megatron-core") in versions.RELEASES


def test_the_extra_asks_for_what_the_table_has():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    asked = {match[1]: match[2] for match in re.finditer(r'"([\w-]+)(?:\[[\w,]+\])?((?:==|>=)[^"]+)"', setup)}
    assert asked["megatron-core"] == f">={min(versions.RELEASES)},<={max(versions.RELEASES)}"
    assert asked["mamba-ssm"] == f"=={PINNED.mamba_ssm}"
    assert asked["causal-conv1d"] == f"=={PINNED.causal_conv1d}"
    minor = PINNED.transformer_engine.rsplit(".", 1)[0]
    assert asked["transformer-engine"].startswith(f">={minor},<")


@pytest.mark.parametrize("package", PACKAGES)
def test_stand_ins_say_the_version_of_the_table(package):
    (said,) = re.findall(r'__version__ = "(.+)"', (STAND_INS / package / "__init__.py").read_text())
    assert said == getattr(PINNED, package)


# ---------------------------------------------------------------- names and parameters


@pytest.mark.parametrize("package", PACKAGES)
def test_files_classes_and_functions_are_the_releases(releases, package):
    invented = []
    for file in stand_in_files(package):
        theirs = releases[package] / file
        if not theirs.is_file():
            invented.append(str(file))
            continue
        own = {**classes(STAND_INS / file), **functions(STAND_INS / file)}
        known = {**classes(theirs), **functions(theirs)}
        public = [name for name in own if not re.search(r"(^|\.)_[^_]", name) and name.split(".")[0] not in OWN_NAMES]
        inherited = {name for name in public if "." in name and name.split(".")[0] in known}
        invented += [f"{file}: {name}" for name in public if name not in known and name not in inherited | OWN_NAMES]
    assert not invented


@pytest.mark.parametrize("package", PACKAGES)
def test_parameters_are_the_releases(releases, package):
    compared, other = 0, {}
    for file in stand_in_files(package):
        own, theirs = functions(STAND_INS / file), functions(releases[package] / file)
        for name in own.keys() & theirs.keys():
            mine, real = parameters(own[name]), parameters(theirs[name])
            compared += 1
            if mine != real and not _is_stub(own[name]):
                other[f"{file}: {name}"] = (mine, real)
    assert not other
    assert compared >= (40 if package == "transformer_engine" else 2)


def _is_stub(function: ast.FunctionDef) -> bool:
    """Tell whether a function takes whatever comes."""
    return function.args.vararg is not None and function.args.vararg.arg == "_"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_packages_offer_is_the_releases(releases, package):
    missing = []
    for file in stand_in_files(package):
        if file.name != "__init__.py":
            continue
        module = ".".join(file.parent.parts)
        for node in ast.walk(parsed(STAND_INS / file)):
            if isinstance(node, ast.ImportFrom) and node.module != "transformer_engine.stand_in":
                names = [alias.name for alias in node.names]
                missing += [f"{module}.{name}" for name in names if not has_name(releases[package], module, name)]
    assert set(missing) <= {  # the release has these from C++
        "transformer_engine.pytorch.optimizers.multi_tensor_l2norm",
        "transformer_engine.pytorch.optimizers.multi_tensor_scale",
    }


def _megatron_core() -> Path:
    """Return megatron-core's folder without importing it, which only megatron_ext/device.py may do first."""
    return Path(find_spec("megatron.core").submodule_search_locations[0])


def test_megatron_core_finds_in_the_stand_in_what_it_finds_in_the_release(releases):
    """An import that fails turns a feature off without a word: it has to fail with the stand-in as well."""
    other = set()
    for path in _megatron_core().rglob("*.py"):
        if "transformer_engine" not in (text := path.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_engine."):
                for alias in node.names:
                    real = has_name(releases["transformer_engine"], node.module, alias.name)
                    if has_name(STAND_INS, node.module, alias.name) != real:
                        other.add(f"{node.module}.{alias.name}: the release {'has it' if real else 'has none'}")
    assert not other


def test_megatron_core_has_no_gemm_of_this_release(releases):
    """It asks for a workspace that 2.11 no longer has, and its routers multiply in torch instead."""
    assert not has_name(releases["transformer_engine"], "transformer_engine.pytorch.module.base", "get_workspace")
    assert module_file(releases["transformer_engine"], "transformer_engine.pytorch.cpp_extensions.gemm")


def test_flash_attention_takes_what_rollouts_give_it(releases):
    name = "flash_attn_with_kvcache"
    root = unpacked("flash_attn", PINNED.flash_attn, wheel=False)
    kernel = functions(root / "flash_attn/flash_attn_interface.py")[name]
    known = {argument.arg for argument in (*kernel.args.args, *kernel.args.kwonlyargs)}
    calls = [
        node
        for path in (Path(__file__).parents[2] / "megatron_ext/rollout").glob("*.py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name
    ]
    assert calls and all(keyword.arg in known for call in calls for keyword in call.keywords)
    assert has_name(root, "flash_attn", name)


# ---------------------------------------------------------------- assertions


@pytest.mark.parametrize("file", COMPARED)
def test_what_the_release_asserts_the_stand_in_asserts(releases, file):
    package = file.split("/")[0]
    mine, theirs = refusals(parsed(STAND_INS / file)), functions(releases[package] / file)
    missing = []
    for name, left_out in COMPARED[file].items():
        real = refusals(theirs[name])
        missing += [text for text in real - mine if not any(part in text for part in left_out)]
        unused = [part for part in left_out if not any(part in text for text in real)]
        assert not unused, f"{name} no longer asserts {unused}"
    assert not missing


def cpp_refusals(release: Path, function: str) -> set[str]:
    """Return what a function of causal-conv1d's C++ refuses, as the statement in Python that its stand-in has."""
    source = (release / "csrc/causal_conv1d.cpp").read_text()
    body = re.search(rf"\n{function}\(.*?\n}}\n", source, re.DOTALL)[0]
    found = set()
    for text in re.findall(r"TORCH_CHECK\((.*?)\);", body, re.DOTALL):
        message = re.search(r', "(.*)"$', text)
        found.add(f"raise RuntimeError({(message[1] if message else text)!r})")
    return found


CPP = "causal_conv1d/causal_conv1d_interface.py"
CPP_COMPARED = {  # functions of C++ whose every refusal the stand-in has, but for those whose text holds one of these
    "causal_conv1d_fwd": {
        "is_cuda()": ONLY_ON_A_GPU,
        "states": NOT_REACHED, "weight_type == at": "the weights are fp32", "is_contiguous": "made so in Python",
        "x.stride(2) == 1": "made so in Python", "bias.stride(-1)": "a vector's",
    },
    "causal_conv1d_update": {
        "is_cuda()": ONLY_ON_A_GPU,
        "weight_type == at": "the weights are fp32", "bias.stride(-1)": "a vector's", "conv_state_indices": NOT_REACHED,
        "cache_seqlens": NOT_REACHED,
    },
}  # fmt: skip


@pytest.mark.parametrize("function", CPP_COMPARED)
def test_what_the_release_asserts_in_cpp_the_stand_in_asserts(releases, function):
    real, mine = cpp_refusals(releases["causal_conv1d"], function), refusals(parsed(STAND_INS / CPP))
    assert {text for text in real - mine if not any(part in text for part in CPP_COMPARED[function])} == set()
    assert len(real) >= 10


@pytest.mark.parametrize("package", PACKAGES)
def test_what_the_stand_in_asserts_the_release_asserts(releases, package):
    invented = []
    for file in stand_in_files(package):
        real = refusals(parsed(releases[package] / file))
        if str(file) == CPP:
            real |= {text for function in CPP_COMPARED for text in cpp_refusals(releases[package], function)}
        # A package that the release's own imports break is broken in the stand-in by one statement.
        said = ("NotImplementedError(", "raise ImportError(")
        own = {text for text in refusals(parsed(STAND_INS / file)) - real if not any(word in text for word in said)}
        if str(file) in SHAPES_IN_OTHER_WORDS:
            own = {text for text in own if "shape" not in text}
        invented += [f"{file}: {text}" for text in own]
    assert not invented


# ---------------------------------------------------------------- kernels


class _Silent(ast.NodeTransformer):
    """Takes the log out of a function."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if ast.unparse(node).startswith("logger.") else node


def _filters(path: Path, condition: str) -> list[str]:
    chooser = _Silent().visit(ast.parse(ast.unparse(functions(path)["get_attention_backend"])))
    branches = [node for node in ast.walk(chooser) if isinstance(node, ast.If)]
    return [ast.unparse(node) for node in branches if ast.unparse(node.test) == condition]


def test_kernels_are_chosen_as_in_the_release(releases):
    """Which kernels an attention with sinks may have: the statement as it stands in the release."""
    file = "transformer_engine/pytorch/attention/dot_product_attention/utils.py"
    condition = "softmax_type != 'vanilla'"
    (real,) = _filters(releases["transformer_engine"] / file, condition)
    assert _filters(STAND_INS / file, condition) == [real]
