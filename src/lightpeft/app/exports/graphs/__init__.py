"""Light models as computation graphs in a file, ONNX's or OpenVINO's: traced, written, read back and compared."""
