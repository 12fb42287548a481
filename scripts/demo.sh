#!/usr/bin/env bash
# From plain text to a chat: train a base model, teach it to answer, measure both. Run by `make demo`.
# A demo that was stopped continues where it was; remove runs/tiny and runs/tiny-chat to start afresh.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
resume() { if compgen -G "$1/checkpoints/step-*" > /dev/null; then echo --resume; fi; }

step "1/5  A DeepSeek-V4 model learns from Jane Austen and Python source (about 5 minutes)"
fathom info tiny
# shellcheck disable=SC2046
fathom train recipes/tiny.toml $(resume runs/tiny)

step "2/5  It learns to answer in the chat format (about 2.5 minutes)"
# shellcheck disable=SC2046
fathom sft recipes/tiny-chat.toml $(resume runs/tiny-chat)

step "3/5  The base model beside gzip, xz and n-grams, on held-out text"
fathom eval runs/tiny

step "4/5  What it writes"
for prompt in "It was a fine morning, and Emma" "def shortest_path(G, source"; do
  fathom generate runs/tiny --prompt "$prompt" --max-tokens 60 --temperature 0.7 --seed 1
  echo
done

step "5/5  What it answers: held-out questions, each answer checked by a program"
fathom eval runs/tiny-chat --questions 80
for question in "Who are you?" "What is 3 + 4?" "What day comes after Monday?"; do
  printf '> %s\n' "$question"
  fathom chat runs/tiny-chat --think off --temperature 0 --message "$question"
done

cat <<END

loss curves:  runs/tiny/loss.png  runs/tiny-chat/loss.png
talk to it:   .venv/bin/fathom chat runs/tiny-chat
END
