# A small image of the relay. Debian 13 for its OpenSSL 3.5.
#
#   docker build -t underpass-relay .
#   docker run --rm -p 443:443 -p 80:80 -p 3478:3478/udp -v relay-state:/var/lib/underpass-relay \
#     -e UNDERPASS_RELAY_SERVER_HOSTNAME=relay.example.com -e UNDERPASS_RELAY_TLS_MODE=acme \
#     underpass-relay
#
# Every key of the configuration can be set by the environment; a file may be mounted at
# /etc/underpass-relay/relay.toml. SIGTERM drains: give "docker stop" 30 s by --time.

FROM python:3.13-slim-trixie AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY traversal traversal
COPY relay relay
COPY netlab netlab
RUN python -m venv /opt/underpass \
    && /opt/underpass/bin/pip install --no-cache-dir '.[acme]' \
    && /opt/underpass/bin/pip uninstall --yes pip

FROM python:3.13-slim-trixie
COPY --from=build /opt/underpass /opt/underpass
RUN useradd --system --uid 10001 --no-create-home relay \
    && install -d -o relay -g relay -m 700 /var/lib/underpass-relay
ENV PATH=/opt/underpass/bin:$PATH PYTHONUNBUFFERED=1
USER relay
VOLUME /var/lib/underpass-relay
EXPOSE 443/tcp 80/tcp 3478/udp
# The admin listener is on loopback inside the container, port 9090, unless configured otherwise.
HEALTHCHECK --interval=30s --timeout=6s --start-period=10s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:9090/healthz', timeout=5)"]
ENTRYPOINT ["underpass-relay"]
CMD ["serve"]
