# The Space that stands in front of a server; build it from the project's root:
#   docker build -f examples/deploy/space.Dockerfile -t ivtp-llava-space .
FROM python:3.11-slim-bookworm

RUN pip install --no-cache-dir 'gradio>=6.0,<7' 'openai>=2,<4' \
    && useradd --create-home --uid 1000 visitor

WORKDIR /space
COPY examples/space/chat.py .

USER 1000
ENV GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_ANALYTICS_ENABLED=False
EXPOSE 7860
ENTRYPOINT ["python", "chat.py"]
