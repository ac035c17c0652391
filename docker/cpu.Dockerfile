# The lab without a GPU. From the top of the repository:
#   docker build -f docker/cpu.Dockerfile -t iterft .
#   mkdir -p runs && docker run --rm -it --user "$(id -u):$(id -g)" -v "$PWD/runs:/lab/runs" iterft run nano_sft
FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential cmake git && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# a container runs on other processors than the one it was built on: no instructions of this one alone
RUN python -m venv /opt/iterft \
 && /opt/iterft/bin/pip install --no-cache-dir "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu \
 && CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" \
    /opt/iterft/bin/pip install --no-cache-dir .

FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/iterft /opt/iterft
ENV PATH=/opt/iterft/bin:$PATH HOME=/lab USER=iterft ITERFT_CACHE=/lab/.cache OMP_WAIT_POLICY=PASSIVE
# any user may write there: `--user "$(id -u):$(id -g)"` leaves run folders that are one's own
RUN mkdir -p /lab/.cache && chmod 777 /lab /lab/.cache
WORKDIR /lab
ENTRYPOINT ["iterft"]
