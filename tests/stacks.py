"""What the doctor finds in a process with torch: on a CPU, and on an H200."""

from __future__ import annotations

from surefoot.doctor.stack import Library, Stack

CPU = Stack(torch="2.13.0+cpu", folder="/site/torch")
H200 = Stack(
    torch="2.11.0+cu130",
    folder="/site/torch",
    cuda="13.0",
    cudnn_compiled="9.19.0",
    architectures=("sm_75", "sm_80", "sm_90", "compute_120"),
    gpus=(("NVIDIA H200", (9, 0)),),
    libraries=(Library("cudnn", ("/site/nvidia/cudnn/lib/libcudnn.so.9",), "9.19.0"),),
)
