"""Compiled text as TPU's compiler writes it: loops without a noted length, overlapped collectives, groups."""

from __future__ import annotations

import pytest

from sdjax.plan.collectives import collectives, group_size
from sdjax.plan.hlo import Instruction, Module, parse_instruction, parse_shapes
from sdjax.plan.programs import refused
from sdjax.plan.traffic import device_work, memory_traffic

LOOP = """
%body (state: (s32[], f32[8,512], s32[])) -> (s32[], f32[8,512], s32[]) {
  %state = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,512]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %n = s32[]{:T(128)} get-tuple-element(%state), index=2
  %next = s32[]{:T(128)} add(%i, %one)
  %sum = f32[8,512]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %tuple = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) tuple(%next, %sum, %n)
}

%compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%b, %a), direction=LT
}

%condition (state.1: (s32[], f32[8,512], s32[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=2
  ROOT %more = pred[]{:T(512)} fusion(%n.1, %i.1), kind=kLoop, calls=%compare
}

ENTRY %main (x.1: f32[8,512]) -> f32[8,512] {
  %x.1 = f32[8,512]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %begin = s32[]{:T(128)} copy(%zero)
  %seven = s32[]{:T(128)} constant(7)
  %first = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) tuple(%begin, %x.1, %seven)
  %while = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)S(1)}, s32[]) while(%first), body=%body, condition=%condition
  ROOT %last = f32[8,512]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""


def test_a_loops_length_is_read_off_its_condition():
    """The bound is carried in the state, and compared in a fusion whose operands are swapped."""
    module = Module(LOOP)
    assert module.runs["body"] == 7
    assert module.unknown_loops == 0
    assert collectives(module, 8) == {"all-reduce": (7, 7 * 2 * 3 / 4 * 8 * 512 * 4)}


def test_a_loop_of_unknown_length_is_said_to_be_one():
    module = Module(LOOP.replace("constant(7)", "parameter(1)"))
    assert module.runs["body"] == 1
    assert module.unknown_loops == 1


OVERLAPPED = """
%begin (p: bf16[512,64]) -> bf16[4096,64] {
  %p = bf16[512,64]{1,0} parameter(0)
  ROOT %gather = bf16[4096,64]{1,0} all-gather(%p), channel_id=3, replica_groups={}, frontend_attributes={chain_id="0"}
}

%meanwhile (q: bf16[512,64]) -> bf16[4096,64] {
  %q = bf16[512,64]{1,0} parameter(0)
  ROOT %other = bf16[4096,64]{1,0} all-gather(%q), channel_id=3, replica_groups={}, frontend_attributes={chain_id="0"}
}

%wrapped (r: f32[4096]) -> f32[512] {
  %r = f32[4096]{0} parameter(0)
  ROOT %scatter = f32[512]{0} reduce-scatter(%r), channel_id=4, replica_groups={}, dimensions={0}, to_apply=%add
}

%all-reduce-scatter.1 (s: f32[4096]) -> f32[512] {
  %s = f32[4096]{0} parameter(0)
  %whole = f32[4096]{0} all-reduce(%s), channel_id=5, replica_groups={}, to_apply=%add
  %at = s32[] constant(0)
  ROOT %own = f32[512]{0} dynamic-slice(%whole, %at), dynamic_slice_sizes={512}
}

ENTRY %main (x: bf16[512,64], y: f32[4096]) -> f32[512] {
  %x = bf16[512,64]{1,0} parameter(0)
  %y = f32[4096]{0} parameter(1)
  %a = bf16[4096,64]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %b = bf16[4096,64]{1,0} fusion(%x), kind=kCustom, calls=%meanwhile
  %c = ((f32[4096]{0}), f32[512]{0}, u32[]) async-start(%y), calls=%wrapped
  %d = f32[512]{0} async-done(%c), calls=%wrapped
  %e = (bf16[512,64]{1,0}, bf16[512,64]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %f = bf16[512,64]{1,0} collective-permute-done(%e)
  ROOT %g = f32[512]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_overlapped_collectives_count_once():
    assert collectives(Module(OVERLAPPED), 8) == {
        "all-gather": (1, 7 * 512 * 64 * 2),
        "reduce-scatter": (2, 2 * 7 / 8 * 4096 * 4),
        "collective-permute": (1, 512 * 64 * 2),
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", 4),
        ("replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)4}, metadata={}", 8),
        ("replica_groups={}", 16),
    ],
)
def test_groups_are_read_in_every_way_they_are_written(text: str, size: int):
    assert group_size(Instruction("x", "all-gather", (), (), text), 16) == size


def test_shapes_of_tuples_and_memories():
    shapes = parse_shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s4[5]{0}, pred[], f8e4m3fn[7]{0})")
    assert [shape.nbytes for shape in shapes] == [12, 3, 1, 7]
    assert [shape.on_chip for shape in shapes] == [True, False, False, False]


def test_dilated_convolutions_count_what_is_multiplied():
    """A batched product of 8 pairs, [16, 32] by [32, 64], as a TPU's compiler writes it: a dilated convolution."""
    text = """
ENTRY %main (x: f32[8,16,32], y: f32[8,32,64]) -> f32[8,16,64] {
  %x = f32[8,16,32]{2,1,0} parameter(0)
  %y = f32[8,32,64]{2,1,0} parameter(1)
  ROOT %c = f32[8,16,64]{2,1,0} convolution(%x, %y), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""
    assert device_work(Module(text)).flops == 2 * 8 * 16 * 32 * 64


def test_traffic_of_slices_and_on_chip_memory():
    text = """
%cut (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %same = f32[100,8]{1,0} bitcast(%p)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%same, %i, %i), dynamic_slice_sizes={1,8}
}

ENTRY %main (x: f32[100,8], i.1: s32[]) -> f32[1,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %i.1 = s32[]{:S(1)} parameter(1)
  %row = f32[1,8]{1,0} fusion(%x, %i.1), kind=kLoop, calls=%cut
  %near = f32[1,8]{1,0:S(1)} negate(%row)
  ROOT %far = f32[1,8]{1,0} negate(%near)
}
"""
    assert memory_traffic(Module(text)) == 4 * (8 + 8) + 4 * 8 + 4 * 8


def test_compilers_say_how_much_they_lack():
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    message += "Used 20.52G of 15.75G hbm. Exceeded hbm capacity by 4.77G."
    assert refused(message)[:2] == (20.52 * 2**30, 15.75 * 2**30)
    other = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.00G) "
    assert refused(other + "exceeds available HBM (15.75G).")[:2] == (512.0 * 2**30, 15.75 * 2**30)
    assert refused("RESOURCE_EXHAUSTED: whatever\nmore") == (None, None, "RESOURCE_EXHAUSTED: whatever")


def test_an_instruction_is_taken_apart():
    line = "  ROOT %a.1 = (f32[2]{0:T(8,128)}, u32[]) copy-start(%b), cross_program_prefetch_index=0, metadata={x=y}"
    found = parse_instruction(line)
    assert (found.name, found.opcode, found.operands, found.root) == ("a.1", "copy-start", ("b",), True)
    assert found.nbytes == 12
