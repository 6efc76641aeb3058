#!/bin/sh
# Checks docs/asyncapi.yaml with the official parser. Needs node 18 or later and
# npm; the parser itself comes pinned by package-lock.json.
set -eu
cd "$(dirname "$0")"
command -v npm >/dev/null || { echo "npm is not installed: apt-get install nodejs npm" >&2; exit 1; }
npm ci --no-audit --no-fund --ignore-scripts --loglevel=error
exec node check.js
