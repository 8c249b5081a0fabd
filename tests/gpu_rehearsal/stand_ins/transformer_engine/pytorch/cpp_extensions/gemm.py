"""Matrix products by the names of the C++ extension's wrappers."""

from transformer_engine.stand_in import not_here


def general_gemm(
    A,
    B,
    out_dtype=None,
    quantization_params=None,
    gelu=False,
    gelu_in=None,
    alpha=1.0,
    beta=None,
    accumulate=False,
    layout="TN",
    out=None,
    bias=None,
    use_split_accumulator=False,
    grad=False,
    ub=None,
    ub_type=None,
    extra_output=None,
    bulk_overlap=False,
):
    """Multiply as cuBLAS counts, column by column: B A' for layout TN, B A for NN, B' A for NT."""
    assert layout in ("TN", "NN", "NT"), f"GEMM layout {layout} not supported."
    if any(value is not None for value in (quantization_params, gelu_in, beta, out, ub, extra_output)):
        not_here("general_gemm with quantizers, GELU, accumulation or communication")
    left = B.t() if layout[1] == "T" else B
    right = A.t() if layout[0] == "T" else A
    product = left.to(out_dtype or B.dtype) @ right.to(out_dtype or B.dtype)
    return product if bias is None or grad else product + bias.to(product.dtype), None, None, None


def general_grouped_gemm(
    A,
    B,
    out,
    quantization_params,
    out_dtype,
    layout="TN",
    m_splits=None,
    gelu=False,
    grad=False,
    accumulate=False,
    bias=None,
    use_bias=False,
    use_split_accumulator=False,
    D_dtype=None,
    single_output=False,
):
    not_here("general_grouped_gemm")
