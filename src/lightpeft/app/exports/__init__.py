"""Export of light models: merged, PEFT, GGUF, ONNX and OpenVINO."""
