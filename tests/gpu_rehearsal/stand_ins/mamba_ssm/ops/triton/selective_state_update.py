"""One step of the recurrence: a name only, for decoding."""


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    raise NotImplementedError("the stand-in for mamba-ssm has selective_state_update by name only")
