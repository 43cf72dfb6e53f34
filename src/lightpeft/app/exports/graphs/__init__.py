"""Light models as ONNX or OpenVINO graphs: tracing, writing, loading and measuring."""
