# The lessons, in a container. Here:
#   docker build --tag recnn .
#   docker run --rm --publish 8888:8888 --publish 8000:8000 --volume recnn-data:/home/recnn/recnn/data recnn
# opens JupyterLab at the address it prints. The image holds no data and no model; what the lessons fetch and train lies
# in the volume, but build/model, the folder to ship, in the container alone. So the series and then the service:
#   docker run --rm --no-healthcheck --publish 8000:8000 --volume recnn-data:/home/recnn/recnn/data recnn \
#       sh -c "make run && make serve ADDRESS=0.0.0.0"
FROM python:3.11.14-slim-bookworm
# where packages come from, if not from PyPI: --build-arg PIP_EXTRA_INDEX_URL=… (of a torch for processors, say)
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 recnn
USER recnn
RUN mkdir --parents /home/recnn/recnn/data
WORKDIR /home/recnn/recnn
COPY --chown=recnn requirements.txt constraints.txt pyproject.toml Makefile ./
COPY --chown=recnn build/requirements.txt build/
COPY --chown=recnn helpers helpers
RUN make .venv/ready
COPY --chown=recnn . .
EXPOSE 8888 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD [".venv/bin/python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8888/api', timeout=4)"]
CMD [".venv/bin/jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--notebook-dir=notes"]
