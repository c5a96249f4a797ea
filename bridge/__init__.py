"""The bridge: touches environments and robots, and owns the wire. Needs neither torch nor onnxruntime."""
