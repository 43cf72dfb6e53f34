"""Other programs' formats: GGUF, ONNX and OpenVINO."""
