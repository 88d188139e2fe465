# vLLM for CPUs with the plug-in; build it from the project's root:
#   docker build -f examples/deploy/vllm-cpu.Dockerfile -t ivtp-llava-vllm:cpu .
FROM python:3.11-slim-bookworm

# torch.compile calls g++; vLLM asks libnuma where memory is; the rest of its environment comes from `make vllm-env`.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /ivtp
COPY . .
RUN PIP_NO_CACHE_DIR=1 make vllm-env VLLM=/opt/vllm \
    && useradd --create-home --uid 1000 server \
    && install --directory --owner=1000 /weights

USER 1000
ENV VLLM_CPU_KVCACHE_SPACE=4 \
    VLLM_NO_USAGE_STATS=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
    CMD ["/opt/vllm/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["/opt/vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
