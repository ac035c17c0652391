# The lab on an NVIDIA GPU (driver for CUDA 13 and the NVIDIA container toolkit on the host). From the top of the repository:
#   docker build -f docker/cuda.Dockerfile --build-arg ARCHITECTURES=90 -t iterft-cuda .
#   docker run --rm -it --gpus all --ipc=host -v "$PWD/runs:/lab/runs" -v iterft-hub:/lab/.cache/huggingface \
#     iterft-cuda run sft
# ARCHITECTURES is the GPU's compute capability without the point: 75 RTX 20 and T4, 86 RTX 30, 89 RTX 40, 90 H100, 120 RTX 50.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG ARCHITECTURES=75;80;86;89;90;120
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential cmake git python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# the devel image is kept: Triton compiles kernels while it trains; llama.cpp links against a driver that is not here yet
RUN python3 -m venv /opt/iterft \
 && ln -s /usr/local/cuda/lib64/stubs/libcuda.so /usr/local/cuda/lib64/stubs/libcuda.so.1 \
 && LD_LIBRARY_PATH=/usr/local/cuda/lib64/stubs CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES='$ARCHITECTURES' \
-DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,/usr/local/cuda/lib64/stubs" \
    /opt/iterft/bin/pip install --no-cache-dir '.[gpu]'
ENV PATH=/opt/iterft/bin:$PATH HOME=/lab USER=iterft ITERFT_CACHE=/lab/.cache OMP_WAIT_POLICY=PASSIVE
# any user may write there: `--user "$(id -u):$(id -g)"` leaves run folders that are one's own
RUN mkdir -p /lab/.cache && chmod 777 /lab /lab/.cache
WORKDIR /lab
ENTRYPOINT ["iterft"]
