"""Texts of compiled programs, as `compiled.as_text()` returns them."""

# What XLA writes for a TPU, shortened: exchanges of a step, of a branch, and in a loop of that.
TPU_PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add.1 (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum.1 = f32[] add(%x, %y)
}

%body.2 (state: (s32[], s32[1])) -> (s32[], s32[1]) {
  %all-reduce.7 = (s32[1]{0:T(128)}, s32[1]{0:T(128)}) all-reduce(%a, %b), to_apply=%add.1
}

%condition.3 (state: (s32[], s32[1])) -> pred[] {
  %compare.1 = pred[] compare(%a, %b), direction=LT
}

%branch_1.4_spmd (arg: (f32[4,8])) -> pred[4,8] {
  %while.1 = (s32[], s32[1]) while(%init), condition=%condition.3, body=%body.2
  ROOT %all-gather.9 = pred[8,8]{1,0:T(8,128)(4,1)} all-gather(%mask), dimensions={0}, metadata={op_name="jit(step)/optimizer/cond/branch_1_fun/sort" stack_frame_id=3}
}

%branch_0.5_spmd (arg: (f32[4,8])) -> pred[4,8] {
  ROOT %copy.1 = pred[4,8]{1,0} copy(%mask)
}

%wrapped_gather.6 (param: f32[3,3,4,4]) -> f32[3,3,4,8] {
  ROOT %all-gather.2 = f32[3,3,4,8]{3,2,1,0} all-gather(%param), dimensions={3}, metadata={op_name="jit(step)/jvp()/conv_general_dilated"}
}, execution_thread="main"

ENTRY %main.7_spmd (param: f32[7], param.1: pred[3,3,2,64]) -> f32[8] {
  %param.1 = pred[3,3,2,64]{3,2,1,0:T(8,128)(4,1)} parameter(1), metadata={op_name="state.masks"}
  %param = f32[7]{0:T(128)S(1)} parameter(0), sharding={replicated}
  %param.2 = u32[2]{0} parameter(2)
  %param.3 = f32[] parameter(3)
  %all-reduce-start.1 = f32[8]{0} all-reduce-start(%param), to_apply=%add.1
  %all-reduce-done.1 = f32[8]{0} all-reduce-done(%all-reduce-start.1), metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
  %all-gather-start.3 = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%x), dimensions={0}
  %all-gather-done.3 = bf16[8]{0} all-gather-done(%all-gather-start.3)
  %permute.1 = (f32[2]{0}, /*index=1*/s4[8]{0}) collective-permute(%x, %y), source_target_pairs={{0,1}}
  %async.1 = ((f32[3,3,4,4]), f32[3,3,4,8]) async-start(%p), calls=%wrapped_gather.6
  %conditional.1 = (pred[4,8]{1,0}) conditional(%due, %a, %b), branch_computations={%branch_0.5_spmd, %branch_1.4_spmd}
}
"""  # noqa: E501

# What XLA writes for a GPU, shortened: libraries' convolutions and products, and one of Triton.
GPU_PROGRAM = """HloModule jit_step, is_scheduled=true

%gemm_fusion_dot.1_computation (parameter_0: bf16[4,64,128], parameter_1: bf16[4,128,256]) -> f32[4,64,256] {
  %parameter_0 = bf16[4,64,128]{2,1,0} parameter(0)
  %parameter_1 = bf16[4,128,256]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[4,64,256]{2,1,0} dot(%parameter_0, %parameter_1), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}, backend_config={"sizes":["16"]}
}

ENTRY %main.0_spmd (images: bf16[2,8,8,16], kernel: bf16[32,3,3,16], a: bf16[64,128], b: bf16[128,256]) -> bf16[32,3,3,16] {
  %images = bf16[2,8,8,16]{3,2,1,0} parameter(0)
  %kernel = bf16[32,3,3,16]{3,2,1,0} parameter(1)
  %a = bf16[64,128]{1,0} parameter(2)
  %b = bf16[128,256]{1,0} parameter(3)
  %cudnn-conv.1 = (bf16[2,4,4,32]{3,2,1,0}, u8[0]{0}) custom-call(%images, %kernel), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %get-tuple-element.1 = bf16[2,4,4,32]{3,2,1,0} get-tuple-element(%cudnn-conv.1), index=0
  %cudnn-conv-bw-input.1 = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%get-tuple-element.1, %kernel), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %cudnn-conv-bw-filter.1 = (bf16[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%images, %get-tuple-element.1), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %get-tuple-element.2 = bf16[32,3,3,16]{3,2,1,0} get-tuple-element(%cudnn-conv-bw-filter.1), index=0
  %custom-call.3 = (bf16[64,256]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %all-gather-start.1 = ((bf16[8]{0}, pred[8]{0}), (bf16[64]{0}, /*index=1*/pred[64]{0})) all-gather-start(%x, %y), dimensions={0}
  %all-gather-done.1 = (bf16[64]{0}, /*index=1*/pred[64]{0}) all-gather-done(%all-gather-start.1), metadata={op_name="jit(step)/(jvp()/dot_general:optimizer/sort)"}
  %reduce-scatter-start = ((f32[64,8]{1,0}), f32[8,8]{1,0}) reduce-scatter-start(%z), dimensions={0}, to_apply=%add.1
  %reduce-scatter-done = f32[8,8]{1,0} reduce-scatter-done(%reduce-scatter-start)
  ROOT %fusion.1 = bf16[32,3,3,16]{3,2,1,0} fusion(%get-tuple-element.2), kind=kLoop, calls=%fused.1
}
"""  # noqa: E501
