#!/usr/bin/env bash
# Runs a command in the foreground of the terminal, in a process group of its own.
#
# Ctrl-C reaches every process of the terminal's foreground group. Under make that includes make itself,
# which then reports "Interrupt" and fails although the server stopped cleanly. With job control on, only
# the command gets the signal, and its own exit status is what make sees.
set -uo pipefail
if [ -t 0 ]; then
  set -m
  "$@"
  exit $?
fi
exec "$@"
