"""Accounts of compiled programs: loops, collectives, Pallas kernels, copies."""

import pytest

from curia_jax.plan.estimator import accounting, hlo
from tests.plan.estimator import snippets as s


def account(text: str, takes: float = 100.0) -> accounting.Account:
    """Every collective takes `takes` cycles."""
    return accounting.account(hlo.parse(text), lambda kind, size, groups: takes)


def test_cycles_of_the_entry_are_summed_without_those_inside_fusions():
    inner = s.NOTHING.replace("%nothing", "%deep").replace("  ROOT", s.fusion("z", s.X, "%p", 900) + "  ROOT")
    text = s.program(s.fusion("a", s.X, "", 7) + s.fusion("b", s.X, "%a", 5, calls="deep"), inner)
    assert account(text).cycles == 12


def test_loop_body_counts_with_its_trips():
    text = s.program(s.fusion("a", s.X, "", 7) + s.while_("w", "l"), s.loop("l", 12, s.fusion("f", s.X, "%x.l", 10)))
    assert account(text).cycles == 7 + 12 * 10


def test_trips_of_nested_loops_multiply():
    inner = s.loop("i", 3, s.fusion("f", s.X, "%x.i", 10))
    outer = s.loop("o", 4, s.fusion("g", s.X, "%x.o", 1) + s.while_("w.i", "i"))
    result = account(s.program(s.while_("w", "o"), inner, outer))
    assert result.cycles == 4 * (1 + 3 * 10)
    assert [(w.cycles, w.trips) for w in result.costed] == [(4, 4), (120, 12)]


@pytest.mark.parametrize(
    ("bound", "step", "direction", "runs"), [(12, 1, "LT", 12), (12, 2, "LT", 6), (11, 2, "LT", 6), (11, 1, "LE", 12)]
)
def test_trip_count_follows_bound_increment_and_direction(bound: int, step: int, direction: str, runs: int):
    body = s.fusion("f", s.X, "%x.l", 10)
    text = s.program(s.while_("w", "l"), s.loop("l", bound, body, step=step, direction=direction))
    assert account(text).cycles == runs * 10


def test_loop_with_data_dependent_trips_raises():
    text = s.program(s.while_("w", "l"), s.loop("l", 12, "")).replace(" constant(12)", " copy(%j)")
    with pytest.raises(hlo.HloError, match="trip count of the loop w"):
        account(text)


def test_synchronous_collective_is_exposed():
    line = f"  %r = (f32[8,128]{{1,0:T(8,128)}}, f32[4]{{0:T(128)}}) all-reduce(%a, %b), channel_id=1, {s.GROUPS}, to_apply=%add\n"
    (one,) = account(s.program(s.fusion("a", s.X, "", 7) + line + s.fusion("c", s.X, "%a", 500))).collectives
    assert (one.kind, one.bytes, one.hidden, one.overlapped) == ("all-reduce", 4 * (8 * 128 + 4), 0, False)
    assert one.groups == ((0, 1), (2, 3))


def test_chain_of_fusions_is_one_collective_hidden_by_computation_between():
    middle = s.fusion("m", s.X, "%a", 60, calls="gather_middle")
    (one,) = account(s.program(s.START + middle + s.DONE, s.chain())).collectives
    assert (one.kind, one.bytes, one.cycles, one.hidden, one.overlapped) == ("all-gather", 192 * 192 * 2, 100, 60, True)


def test_chain_of_fusions_without_computation_between_is_exposed():
    (one,) = account(s.program(s.START + s.DONE, s.chain())).collectives
    assert (one.hidden, one.overlapped) == (0, False)


def test_collective_in_loop_counts_with_its_trips():
    body = s.START.replace("%a)", "%x.l)") + s.fusion("m", s.X, "%x.l", 500) + s.DONE
    (one,) = account(s.program(s.while_("w", "l"), s.chain(), s.loop("l", 12, body))).collectives
    assert (one.trips, one.hidden) == (12, 100)


def test_concurrent_collectives_share_the_computation_that_hides_them():
    def pair(n: int) -> tuple[str, str]:
        return (
            f"  %s.{n} = (f32[8]{{0:T(128)}}, f32[16]{{0:T(128)}}) all-gather-start(%a), channel_id={n}, {s.GROUPS}\n",
            f"  %d.{n} = f32[16]{{0:T(128)}} all-gather-done(%s.{n})\n",
        )

    (s1, d1), (s2, d2) = pair(1), pair(2)
    first, second = account(s.program(s1 + s2 + s.fusion("m", s.X, "%a", 150) + d1 + d2)).collectives
    assert (first.bytes, first.hidden) == (64, 100)
    assert second.hidden == 50  # the links are shared: 150 cycles cannot hide twice 100


def test_all_reduce_that_keeps_a_part_is_a_reduce_scatter():
    inner = f"""%scatter (p: f32[8,128]) -> f32[4,128] {{
  %p = {s.X} parameter(0)
  %all-reduce.9 = {s.X} all-reduce(%p), channel_id=9, {s.GROUPS}, to_apply=%add
  ROOT %part = f32[4,128]{{1,0:T(4,128)}} dynamic-slice(%all-reduce.9)
}}

"""
    line = "  %all-reduce-scatter = f32[4,128]{1,0:T(4,128)} fusion(%a), kind=kCustom, calls=%scatter\n"
    (one,) = account(s.program(line, inner)).collectives
    assert (one.kind, one.bytes) == ("reduce-scatter", 8 * 128 * 4)


def test_send_and_receive_between_tpu_slices_are_one_collective():
    (one,) = account(s.program(s.between_slices(s.fusion("m", s.X, "%a", 60)))).collectives
    assert (one.kind, one.bytes, one.groups, one.hidden) == ("all-reduce", 512, None, 60)


def test_cycle_hides_one_collective_within_and_one_between_tpu_slices():
    """They share no links."""
    middle = s.fusion("m", s.X, "%a", 60)
    lines = s.between_slices(s.START + middle + s.DONE)
    found = account(s.program(lines, s.chain())).collectives
    assert sorted((one.kind, one.hidden) for one in found) == [("all-gather", 60), ("all-reduce", 60)]


def test_sparse_core_collective_starts_where_it_gets_its_operand():
    before, during = s.fusion("b", s.X, "%a", 50), s.fusion("d", s.X, "%a", 70)
    inner, lines = s.on_sparse_cores(before, during)
    found = account(s.program(lines, inner))
    (one,) = found.collectives
    assert (one.kind, one.bytes, one.hidden, one.overlapped) == ("reduce-scatter", 192 * 192 * 2, 70, True)
    assert (found.cycles, found.uncosted) == (120, ())


def test_end_of_asynchronous_slice_is_no_collective():
    part = "  %s = ((f32[8,128]{1,0}), f32[4,128]{1,0:S(1)}, s32[]) async-start(%a), calls=%nothing\n"
    done = "  %e = f32[4,128]{1,0:S(1)} async-done(%s)\n"
    assert account(s.program(part + s.fusion("m", s.X, "%a", 60) + done)).collectives == ()


def test_pallas_kernel_is_listed_with_its_flops_and_bytes():
    kernel = (
        '  %k = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%a), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(step)/jvp(encoder)/attention/pallas_call"}, '
        'backend_config={"custom_call_config": {"cost_estimate": {"flops": 123, "transcendentals": 4, "bytes_accessed": 5}}}\n'
    )
    buffer = '  %b = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"\n'
    (one,) = account(s.program(s.fusion("a", s.X, "", 7) + kernel + buffer)).uncosted
    assert (one.name, one.flops, one.bytes, one.trips) == ("tpu_custom_call", 123, 8 * 128 * 2 + 8 * 128 * 4, 1)


def test_fusion_belongs_to_the_scope_of_its_matmul():
    middle = s.fusion("m", s.X, "%a", 60, op_name="jit(step)/jvp(encoder)/norm/mul", calls="gather_middle")
    (work,) = account(s.program(s.START + middle + s.DONE, s.chain())).costed
    assert work.op_name == "jit(step)/jvp(encoder)/attention/dot_general"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x=1", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4], x=1", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}, x=1", ((0, 1, 2, 3),)),
        # The mesh is arange(6).reshape(2, 3).T: its rows are devices 0 3, 1 4, 2 5.
        (
            "replica_groups=mesh['axis_0'=1,'axis_1'=3,'axis_2'=2], device_ids=([2,3]T(1,0)) {'axis_2'}, x=1",
            ((0, 3), (1, 4), (2, 5)),
        ),
        (
            "replica_groups=mesh['axis_0'=1,'axis_1'=3,'axis_2'=2], device_ids=([2,3]T(1,0)) {'axis_1'}, x=1",
            ((0, 1, 2), (3, 4, 5)),
        ),
        ("source_target_pairs={{0,1},{1,0}}, x=1", ((0, 1), (1, 0))),
    ],
)
def test_replica_groups_are_read_in_every_form(text: str, groups: tuple):
    assert accounting.replica_groups(text) == groups


def test_replica_groups_in_unknown_form_raise():
    with pytest.raises(hlo.HloError, match="replica groups"):
        accounting.replica_groups("replica_groups=mesh['a'=4] {'a':(1)2}")


def test_largest_tensors_are_those_in_hbm():
    text = s.program(
        s.fusion("a", "f32[64,128]{1,0:T(8,128)S(1)}", "", 7)
        + s.fusion("b", "f32[16,128]{1,0:T(8,128)}", "", 7, "jit(step)/x/add")
    )
    assert [(t.shape, name) for t, name in accounting.largest_tensors(hlo.parse(text), 5)] == [
        ((16, 128), "jit(step)/x")
    ]


@pytest.mark.parametrize(("space", "part"), [("S(1)", "jit(step)/reader/mul"), ("", "jit(step)/maker/add")])
def test_asynchronous_copy_belongs_to_its_reader_or_its_maker(space: str, part: str):
    """To the chip's memory: from HBM, for the reader. Back to HBM: for the maker."""
    there, here = s.X.replace("T(8,128)", f"T(8,128){space}"), s.X if space else s.X.replace("T(8,128)", "T(8,128)S(1)")
    text = s.program(
        s.fusion("a", here, "", 7, "jit(step)/maker/add")
        + f"  %c = ({there}, {here}, u32[]{{:S(2)}}) copy-start(%a)\n"
        + s.fusion("m", here, "", 60, "jit(step)/other/add")
        + f"  %d = {there} copy-done(%c)\n  %b = {there} bitcast(%d)\n"
        + s.fusion("f", here, "%b", 7, "jit(step)/reader/mul")
    )
    (one,) = account(text).copies
    assert (one.op_name, one.bytes, one.trips) == (part, 8 * 128 * 4, 1)


def test_prefetched_part_of_an_array_is_a_copy_and_a_collective_is_not():
    part = "  %s = ((f32[8,128]{1,0}), f32[4,128]{1,0:S(1)}, s32[]) async-start(%x), calls=%nothing\n"
    done = "  %e = f32[4,128]{1,0:S(1)} async-done(%s)\n"
    text = s.program(f"  %x = {s.X} parameter(0)\n" + part + s.fusion("m", s.X, "%x", 60) + done)
    (one,) = account(text).copies
    assert one.bytes == 4 * 128 * 4
    inner, lines = s.on_sparse_cores("", s.fusion("d", s.X, "%a", 70))
    assert account(s.program(lines, inner)).copies == ()
