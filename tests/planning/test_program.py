"""Reports of compiled programs: products by formula, loops by trips, collectives and copies by bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from paris_jax.models import flops, functional
from paris_jax.models.dit import DiTConfig
from paris_jax.planning import program

LATENT = (2, 16, 16, 4)
CONFIG = DiTConfig(
    channels=4,
    text_width=16,
    pooled_width=16,
    hidden=128,
    heads=4,
    double_blocks=3,
    single_blocks=4,
    rope_axes=(8, 12, 12),
)

TEXT = """
HloModule jit_step, entry_computation_layout={()->f32[]}

%fused_product (parameter_0: bf16[64,32], parameter_1: f32[32,16]) -> f32[64,16] {
  %parameter_0 = bf16[64,32]{1,0} parameter(0)
  %parameter_1 = f32[32,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,16]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%region_0.1_spmd (param: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %param = (s32[], bf16[64,32]{1,0}) parameter(0)
  %x = bf16[64,32]{1,0} get-tuple-element(%param), index=1
  %w = f32[32,16]{1,0} constant({...})
  %gemm = f32[64,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused_product
  %fmha = (bf16[4,8,2,2]{3,2,1,0}, u8[0]{0}) custom-call(%x, %x), custom_call_target="__cudnn$fmhaSoftmax"
  %gather = (bf16[8,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%x), channel_id=1, dimensions={0}
  %gathered = bf16[64,32]{1,0} all-gather-done(%gather)
  %copy.3 = bf16[64,32]{0,1} copy(%gathered)
  %i = s32[] get-tuple-element(%param), index=0
  ROOT %tuple = (s32[], bf16[64,32]{1,0}) tuple(%i, %copy.3)
}

%below_two (param.3: (s32[], bf16[64,32])) -> pred[] {
  %param.3 = (s32[], bf16[64,32]{1,0}) parameter(0)
  %limit = s32[] constant(2)
  %j = s32[] get-tuple-element(%param.3), index=0
  ROOT %lt = pred[] compare(%j, %limit), direction=LT
}

%turn (param.4: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %param.4 = (s32[], bf16[64,32]{1,0}) parameter(0)
  %y = bf16[64,32]{1,0} get-tuple-element(%param.4), index=1
  %z = bf16[64,32]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
  %k = s32[] get-tuple-element(%param.4), index=0
  ROOT %tuple.2 = (s32[], bf16[64,32]{1,0}) tuple(%k, %z)
}

ENTRY %main.9_spmd (param.1: bf16[64,32]) -> bf16[64,32] {
  %param.1 = bf16[64,32]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,32]{1,0}) tuple(%zero, %param.1)
  %gemm.2 = (bf16[64,64]{1,0}, s8[0]{0}) custom-call(%param.1, %param.1), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %while.7 = (s32[], bf16[64,32]{1,0}) while(%start), condition=%c, body=%region_0.1_spmd, \
backend_config={"known_trip_count":{"n":"5"}}
  %while.8 = (s32[], bf16[64,32]{1,0}) while(%start), condition=%below_two, body=%turn
  %sum = bf16[16]{0} all-reduce(%param.1), to_apply=%add
  ROOT %out = bf16[64,32]{1,0} get-tuple-element(%while.7), index=1
}
"""


def test_every_instruction_counts_as_often_as_it_runs():
    report = program.read(TEXT)
    assert report.flops == {"f32": 5 * 2 * 64 * 16 * 32, "bf16": 2 * 64 * 64 * 32}
    assert report.flash == {"forward": 5, "any": 2}
    assert report.collectives == {"all-gather": (5, 5 * 64 * 32 * 2), "all-reduce": (1, 32)}
    assert report.copied_bytes == 5 * 64 * 32 * 2 and report.collective_bytes == 5 * 4096 + 32


@pytest.mark.parametrize("remat, forwards", [("none", 1), ("full", 2)])
def test_the_products_of_a_training_step_are_those_of_the_formula(remat, forwards):
    """Recomputation repeats the forward pass of the blocks, here 98 % of it."""
    config = dataclasses.replace(CONFIG, remat=remat)
    shapes = (2, *LATENT), (2,), (2, 8, 16), (2,), (2, 16)
    inputs = [jax.ShapeDtypeStruct(s, jnp.int32 if i == 3 else jnp.float32) for i, s in enumerate(shapes)]

    def loss(params, *inputs):
        return jnp.square(functional.apply(config, params, *inputs)).mean()

    text = jax.jit(jax.grad(loss)).lower(functional.abstract(config), *inputs).compile().as_text()
    formula = 2 * flops.forward_flops(config, LATENT, 8) * (2 + forwards)
    assert program.read(text or "").flops["f32"] == pytest.approx(formula, rel=0.03)


# Window and labels of a convolution, its result, its operands, and the multiplications that are not of padding.
CONVOLUTIONS = {
    "a matrix": ("size=1", "0bf_io0->0bf", (2, 9, 8), [(2, 9, 5), (5, 8, 1)], 2 * 9 * 8 * 5),
    "a matrix for each of 12": (
        "size=12 pad=11_11",
        "b0f_0io->b0f",
        (9, 12, 8),
        [(9, 1, 5), (12, 5, 8)],
        9 * 12 * 8 * 5,
    ),
    "a sum over two rows": ("size=2", "0fb_0io->bf0", (6, 7, 1), [(2, 9, 6), (2, 9, 7)], 2 * 6 * 7 * 9),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_products_of_tpus_are_convolutions_of_which_padding_does_not_count(case):
    window, labels, result, shapes, multiplications = CONVOLUTIONS[case]
    kind = f"bf16[{','.join(map(str, result))}]"
    each = program._instruction(f"  %c = {kind} convolution(%x, %w), window={{{window}}}, dim_labels={labels}")
    assert program._product_flops(each, [("bf16", shape) for shape in shapes]) == 2 * multiplications
