# syntax=docker/dockerfile:1
# The image that every host of a run starts. VARIANT says for which machines: tpu, cuda or cpu.
#
#   make image VARIANT=tpu IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/curia-jax
#
# Dependencies are a layer below the source: a change of the source pushes and pulls a few megabytes.
ARG PYTHON=3.11
ARG BEAM=2.77.0

FROM python:${PYTHON}-slim-bookworm AS image
ARG VARIANT=tpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1
WORKDIR /opt/curia-jax
COPY requirements/image-${VARIANT}.txt requirements/
RUN pip install --requirement requirements/image-${VARIANT}.txt

COPY . .
# The commit it was built from, as docker inspect and a launch from inside show it.
ARG REVISION
RUN test -n "${REVISION}" && pip install --no-deps --no-build-isolation .
ENV CURIA_REVISION=${REVISION}
LABEL org.opencontainers.image.title="curia-jax" \
      org.opencontainers.image.revision="${REVISION}"

# Workers of Apache Beam on Dataflow (make image VARIANT=beam): Beam's harness starts, and finds the packages of the build.
FROM apache/beam_python${PYTHON}_sdk:${BEAM} AS beam-sdk
FROM image AS beam
COPY --from=beam-sdk /opt/apache/beam /opt/apache/beam
ENTRYPOINT ["/opt/apache/beam/boot"]

# The last stage is what is built where no target is named.
FROM image
