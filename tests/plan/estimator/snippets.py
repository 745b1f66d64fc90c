"""Small programs in the form that the TPU compiler (libtpu 0.0.52, which writes mesh replica groups as 0.0.50.1 does) prints, reduced to what a test is about."""


def fusion(name: str, shape: str, operands: str, cycles: int | None, op_name: str = "", calls: str = "nothing") -> str:
    """A fusion; without an estimate if `cycles` is None."""
    estimate = f'"estimated_cycles":"{cycles}",' if cycles is not None else ""
    return (
        f"  %{name} = {shape} fusion({operands}), kind=kLoop, calls=%{calls}, "
        f'metadata={{op_name="{op_name}" stack_frame_id=29}}, '
        f'backend_config={{"flag_configs":[],"window_config":{{"kernel_window_bounds":[],{estimate}"iteration_bounds":["1"]}}}}\n'
    )


HEAD = "HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}\n\n"
X = "f32[8,128]{1,0:T(8,128)}"
NOTHING = f"%nothing (p: f32[8,128]) -> f32[8,128] {{\n  ROOT %p = {X} parameter(0)\n}}\n\n"
STATE = "(s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)})"


def loop(name: str, trips: int, body: str, *, step: int = 1, direction: str = "LT") -> str:
    """Condition and body of a loop `name` that counts from 0 to `trips`; `body` leaves its state alone."""
    return f"""%{name}_cond (p.{name}: (s32[], f32[8,128])) -> pred[] {{
  %bound.{name} = s32[]{{:T(128)}} constant({trips})
  %p.{name} = {STATE} parameter(0)
  %i.{name} = s32[]{{:T(128)}} get-tuple-element(%p.{name}), index=0
  ROOT %lt.{name} = pred[]{{:T(512)}} compare(%i.{name}, %bound.{name}), direction={direction}, metadata={{op_name="jit(step)/while/cond/lt"}}
}}

%{name}_body (q.{name}: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %q.{name} = {STATE} parameter(0)
  %j.{name} = s32[]{{:T(128)}} get-tuple-element(%q.{name}), index=0
  %x.{name} = {X} get-tuple-element(%q.{name}), index=1
  %one.{name} = s32[]{{:T(128)}} constant({step})
  %next.{name} = s32[]{{:T(128)}} add(%j.{name}, %one.{name})
{body}  ROOT %r.{name} = {STATE} tuple(%next.{name}, %x.{name})
}}

"""


def while_(name: str, loop_name: str) -> str:
    return (
        f"  %{name} = {STATE} while(%start), condition=%{loop_name}_cond, body=%{loop_name}_body, "
        f'metadata={{op_name="jit(step)/jvp(encoder)/while" stack_frame_id=254}}\n'
    )


def program(entry: str, *computations: str) -> str:
    return HEAD + NOTHING + "".join(computations) + f"ENTRY %main (a: f32[8,128]) -> f32[8,128] {{\n{entry}}}\n"


GROUPS = "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, use_global_device_ids=true"


def chain(channel: int = 2) -> str:
    """An all-gather that starts in one fusion, continues in a second that computes, and ends in a third."""
    gather = f'bf16[192,192]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id={channel}, {GROUPS}, dimensions={{0}}, metadata={{op_name="jit(step)/jvp(encoder)/mlp/convert_element_type"}}'
    pair = "(bf16[96,192]{1,0:T(8,128)(2,1)}, bf16[192,192]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})"
    return f"""%gather_start (p: bf16[96,192]) -> (bf16[96,192], bf16[192,192], u32[]) {{
  %p = bf16[96,192]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-gather.1 = {gather}
  ROOT %c.1 = {pair} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%gather_middle (p: bf16[96,192]) -> (f32[8,128], bf16[96,192]) {{
  %p = bf16[96,192]{{1,0:T(8,128)(2,1)}} parameter(0)
  %matmul = f32[8,128]{{1,0:T(8,128)}} convolution(%p, %p), dim_labels=bf_io->bf, metadata={{op_name="jit(step)/jvp(encoder)/attention/dot_general"}}
  %all-gather.2 = {gather}
  ROOT %t = (f32[8,128]{{1,0:T(8,128)}}, bf16[96,192]{{1,0:T(8,128)(2,1)}}) tuple(%matmul, %p)
}}

%gather_done (p: bf16[96,192]) -> bf16[192,192] {{
  %p = bf16[96,192]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-gather.3 = {gather}
  ROOT %c.3 = bf16[192,192]{{1,0:T(8,128)(2,1)}} custom-call(%p, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}}

"""


START = "  %async-collective-start = (bf16[96,192]{1,0:T(8,128)(2,1)}, bf16[192,192]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%gather_start\n"
DONE = "  %async-collective-done = bf16[192,192]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%gather_done\n"


def between_slices(middle: str) -> str:
    """An all-reduce over the data-centre network around `middle`."""
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.16_0",_xla_megascale_reduce_operation="SUM",'
        '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    return (
        "  %after-all = token[] after-all()\n"
        f"  %send = (f32[1,128]{{1,0:T(1,128)}}, u32[], token[]) send(%a, %after-all), channel_id=3, {attributes}\n"
        f"  %recv = (f32[1,128]{{1,0:T(1,128)}}, u32[], token[]) recv(%after-all), channel_id=2, {attributes}\n"
        f"{middle}"
        "  %send-done = token[] send-done(%send), channel_id=3, is_host_transfer=true\n"
        "  %recv-done = (f32[1,128]{1,0:T(1,128)}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true\n"
    )


def on_sparse_cores(before: str, during: str) -> tuple[str, str]:
    """A reduce-scatter on the SparseCores: its computations, and its lines around `before` and `during`."""
    shape, part = "bf16[192,192]{1,0:T(8,128)(2,1)}", "bf16[96,192]{1,0:T(8,128)(2,1)}"
    inner = f"""%called (p: bf16[192,192]) -> bf16[96,192] {{
  %p = {shape} parameter(0)
  ROOT %reduce-scatter.1 = {part} reduce-scatter(%p), channel_id=9, {GROUPS}, dimensions={{0}}, to_apply=%nothing
}}, execution_thread="sparsecore"

%async_computation (p: bf16[192,192]) -> bf16[96,192] {{
  %p = {shape} parameter(0)
  ROOT %c = {part} custom-call(%p), custom_call_target="TODO(b/522284627)", called_computations={{%called}}
}}, execution_thread="sparsecore"

"""
    lines = (
        '  %rs-start = ((), (), (s32[8192]{0:T(1024)})) async-start(), async_execution_thread="sparsecore", calls=%async_computation\n'
        f"{before}"
        f"  %rs-update = (({shape}), {part}, (s32[8192]{{0:T(1024)}})) async-update(%rs-start, %a), output_to_operand_aliasing={{}}\n"
        f"{during}"
        f"  %rs-done = {part} async-done(%rs-update)\n"
    )
    return inner, lines
