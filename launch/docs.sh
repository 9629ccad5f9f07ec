#!/usr/bin/env bash
# Builds the documentation site, strictly and without a network, into site/. Open site/index.html; search works there too.
#   ./launch/docs.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/venv.sh docs
.venv/bin/python docs/make_site.py
echo "The site is in site/: open site/index.html"
