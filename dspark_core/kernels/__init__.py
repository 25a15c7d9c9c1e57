"""Optional native CPU kernels: C++ sources, compiled once per machine and called through ctypes."""
