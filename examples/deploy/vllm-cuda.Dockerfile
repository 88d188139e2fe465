# vLLM for NVIDIA GPUs with the plug-in; build it from the project's root:
#   docker build -f examples/deploy/vllm-cuda.Dockerfile -t ivtp-llava-vllm:cuda .
FROM vllm/vllm-openai:v0.32.0

WORKDIR /ivtp
COPY . .
# vLLM brings all that the plug-in imports.
RUN python3 -m pip install --no-cache-dir --no-deps .

ENV VLLM_NO_USAGE_STATS=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server"]
