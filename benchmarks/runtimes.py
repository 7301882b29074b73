"""Other runtimes as providers: ONNX Runtime and OpenVINO on a CPU, TensorRT and Torch-TensorRT on a GPU."""

from __future__ import annotations

import copy
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from googlenet_fused import bench
from googlenet_fused.bench import DTYPES, Bind, Run, Unavailable, Workload


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        raise Unavailable(f"{name} does not import: {bench.first_line(error)}") from error


def _needs(workload: Workload, device: str) -> None:
    if workload.case.mode == "training":
        raise Unavailable("it does not train")
    if workload.device.type != device:
        raise Unavailable(f"it is measured on {'a GPU' if device == 'cuda' else 'CPUs'} only")


def onnx_bytes(model: nn.Module, x: Tensor) -> bytes:
    """A model as ONNX for inputs of one shape."""
    _imported("onnx")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = Path(folder, "model.onnx")
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated; it needs no package beyond onnx
        torch.onnx.export(model, (x,), path, dynamo=False)
        return path.read_bytes()


def _fp32_onnx(workload: Workload) -> bytes:
    """With fp32 parameters; the runtimes on a CPU choose their own precision for it."""
    return onnx_bytes(copy.deepcopy(workload.model).float(), workload.input(seed=0).float())


def onnx_runtime(workload: Workload) -> Bind:
    """ONNX Runtime's CPU provider with its default options, and as many threads as torch has."""
    _needs(workload, "cpu")
    if workload.case.dtype != "fp32":
        raise Unavailable(f"ONNX Runtime's CPU provider has no convolution in {workload.case.dtype}")
    onnxruntime = _imported("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_fp32_onnx(workload), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def bind(x: Tensor) -> Run:
        feed = {name: x.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return bind


def openvino(workload: Workload) -> Bind:
    """OpenVINO's CPU plugin for latency, in the precision of the case, and as many threads as torch has."""
    _needs(workload, "cpu")
    core = _imported("openvino").Core()
    precision, name = {"fp32": ("f32", "float32"), "bf16": ("bf16", "bfloat16"), "fp16": ("f16", "float16")}[
        workload.case.dtype
    ]
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    network = core.compile_model(core.read_model(_fp32_onnx(workload)), "CPU", settings)
    chosen = network.get_property("INFERENCE_PRECISION_HINT").to_string()
    if chosen not in (precision, name):
        raise Unavailable(f"OpenVINO runs this in {chosen} on this processor, not in {precision}")
    request = network.create_infer_request()

    def bind(x: Tensor) -> Run:
        feed = x.float().numpy()
        return lambda: torch.from_numpy(request.infer([feed], share_inputs=True, share_outputs=True)[0])

    return bind


def tensorrt(workload: Workload) -> Bind:
    """A TensorRT engine of the model in the case's dtype, on torch's stream, inputs and outputs in torch's memory."""
    _needs(workload, "cuda")
    trt = _imported("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_bytes(workload.model, workload.input(seed=0))):
        raise Unavailable(f"TensorRT does not take this model: {parser.get_error(0)}")
    config = builder.create_builder_config()
    (config.set_flag if workload.case.dtype == "tf32" else config.clear_flag)(trt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Unavailable("TensorRT builds no engine of this model")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    source, target = engine.get_tensor_name(0), engine.get_tensor_name(1)

    def bind(x: Tensor) -> Run:
        def run() -> Tensor:
            out = x.new_empty(tuple(engine.get_tensor_shape(target)), dtype=DTYPES[workload.case.dtype])
            context.set_tensor_address(source, x.data_ptr())
            context.set_tensor_address(target, out.data_ptr())
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError("TensorRT did not start the engine")
            return out

        return run

    return bind


def torch_tensorrt(workload: Workload) -> Bind:
    """Torch-TensorRT's compiler on the plain model."""
    _needs(workload, "cuda")
    library = _imported("torch_tensorrt")
    x = workload.input(seed=0)
    with torch.inference_mode(False), torch.no_grad():
        model = library.compile(
            copy.deepcopy(workload.model),
            ir="dynamo",
            inputs=[x.clone()],
            enabled_precisions={DTYPES[workload.case.dtype]},
            disable_tf32=workload.case.dtype != "tf32",
        )
    return lambda x: lambda: model(x)
