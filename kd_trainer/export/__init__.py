"""Students as files that run without this package: ONNX, torch.export, smp."""

from kd_trainer.export.onnx_file import OnnxStudent, load_onnx

__all__ = ["OnnxStudent", "load_onnx"]
