"""What all layers with weights share: types of parameters and inputs, the tensor group, the extra state."""

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.stand_in import not_here


class _ParameterInitMeta(NamedTuple):
    init_fn: Callable | None = None
    get_rng_state_tracker: Callable | None = None
    fp8_meta_index: int | None = None


def get_dummy_wgrad(shape, dtype, zero=False):
    not_here("get_dummy_wgrad")


def unset(*shape: int, device: Any, dtype: torch.dtype) -> torch.nn.Parameter:
    """Make a parameter that nobody has set: NaN, so that a test notices where the release has whatever was there."""
    return torch.nn.Parameter(torch.full(shape, float("nan"), device=device, dtype=dtype))


class TransformerEngineBaseModule(torch.nn.Module):
    """A layer that never runs in FP8."""

    def __init__(self):
        super().__init__()
        self.name = None
        self.fp8_initialized = False
        self.fp8 = False
        self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False, "fp8_group": None}
        self.tp_group = None
        self.tp_size = 1
        self.sequence_parallel = False
        self.param_init_meta = {}
        self.primary_weights_in_fp8 = FP8GlobalStateManager.with_fp8_parameters()
        self.activation_dtype = None
        self.allow_different_data_and_param_types = False
        self.tp_group_initialized = False

    def get_extra_state(self):
        """Return an empty byte tensor: there is no state but of FP8."""
        fp8_checkpoint = self.fp8_meta["fp8_checkpoint"] or self.fp8 or self.fp8_calibration
        return not_here("FP8's state") if fp8_checkpoint else torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is None:
            return
        if isinstance(state, torch.Tensor):
            if state.numel() == 0:
                return
            state = pickle.loads(state.detach().cpu().numpy().tobytes())
        elif isinstance(state, io.BytesIO):
            state.seek(0)
            state = torch.load(state)
        else:
            raise RuntimeError("Unsupported checkpoint format.")
        if state is not None:
            not_here("FP8's state")

    def set_activation_dtype(self, inp):
        if self.activation_dtype == inp.dtype:
            return
        dtype = inp.dtype
        if not self.allow_different_data_and_param_types:
            for name, param in self.named_parameters():
                if param is not None:
                    assert dtype == param.dtype, (
                        "Data types for parameters must match when outside of autocasted region. "
                        f" Found input dtype: {dtype} and {name!r} dtype: {param.dtype}"
                    )
        self.activation_dtype = dtype

    def set_tensor_parallel_group(self, tp_group):
        self.tp_group = tp_group
        self.tp_group_initialized = True

    def init_fp8_metadata(self, num_gemms=1):
        """Do nothing: it is for FP8."""

    @contextlib.contextmanager
    def prepare_forward(
        self, inp, num_gemms=1, allow_non_contiguous=False, allow_different_data_and_param_types=False
    ) -> Iterator[torch.Tensor]:
        self.allow_different_data_and_param_types = allow_different_data_and_param_types
        if self.tp_size > 1:
            assert self.tp_group_initialized, "TP group not initialized."
        self.set_activation_dtype(inp)
        self.init_fp8_metadata(num_gemms=num_gemms)
        if not allow_non_contiguous and not inp.is_contiguous():
            inp = inp.contiguous()
        yield inp

    def register_parameter(self, name, param, **kwargs):
        super().register_parameter(name, param)
        if hasattr(self, "param_init_meta") and name not in self.param_init_meta:
            self.param_init_meta[name] = _ParameterInitMeta(**kwargs)

    def reset_parameters(self, defer_init=False):
        """Give each parameter its first values, under the random state of its region. It becomes a new object."""
        if defer_init:
            return
        for name, parameter in self.named_parameters(recurse=False):
            meta = self.param_init_meta[name]
            if meta.get_rng_state_tracker is None:
                meta.init_fn(parameter)
            else:
                region = getattr(self, "rng_tracker_name", None)
                with meta.get_rng_state_tracker().fork(*([region] if region else [])):
                    meta.init_fn(parameter)
            setattr(self, name, torch.nn.Parameter(parameter))

    def need_backward_dw(self):
        return False

    def backward_dw(self):
        if self.need_backward_dw():
            not_here("delayed weight gradients")


def constant(value: float) -> Callable[[torch.Tensor], Any]:
    """Return what sets a parameter to `value`."""
    return lambda parameter: torch.nn.init.constant_(parameter, value)


def normal(parameter: torch.Tensor) -> torch.Tensor:
    """Set a parameter as Transformer Engine does where it is told nothing."""
    return torch.nn.init.normal_(parameter, mean=0.0, std=0.023)
