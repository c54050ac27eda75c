#!/usr/bin/env bash
# Finds a cargo that is new enough, and runs it on this project.
#
# Usage: cmake/find_cargo.sh [COMMAND [OPTION...]]
#
# Looks on the PATH, in $CARGO_HOME/bin, in ~/.cargo/bin and in
# /usr/lib/rust-*/bin for the first cargo of Cargo.toml's rust-version or newer.
# Without a COMMAND it prints the folder; else it runs `cargo COMMAND OPTION...`
# with that folder's rustc. A folder vendor/ in the project, which `cargo
# vendor` makes, is where the crates come from, without a network.
# shellcheck source=SCRIPTDIR/shell.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/shell.sh"

cd -- "$project"
minimum=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' Cargo.toml)
seen=()
found=
while IFS= read -r dir; do
  [[ -x $dir/cargo ]] || continue
  version=$("$dir/cargo" --version 2> /dev/null |
            sed -n 's/^cargo \([0-9.]*\).*/\1/p') || version=
  if [[ -n $version ]] && at_least "$version" "$minimum"; then
    found=$dir
    break
  fi
  seen+=("$dir/cargo has version ${version:-unknown}")
done < <(printf '%s\n' "${PATH//:/$'\n'}" "${CARGO_HOME:-$HOME/.cargo}/bin" \
           "$HOME/.cargo/bin" /usr/lib/rust-*/bin)
[[ $found ]] ||
  die "Rust $minimum or newer is needed; its cargo was not found on the PATH," \
      "in ~/.cargo/bin or in /usr/lib/rust-*/bin." "${seen[@]}" \
      "Debian 12: apt-get install cargo-web rustc-web. Elsewhere: rustup (see" \
      "rust-lang.org), or your distribution's cargo."
if (( ! $# )); then echo "$found"; exit; fi

command=$1
shift
# The bridge's C++ is built by Make, too, whose job server does not reach cargo.
unset MAKEFLAGS
PATH=$found:$PATH
vendored=()
if [[ -d vendor && $command != fmt && $command != -* ]]; then
  vendored=(--config 'source.crates-io.replace-with="vendor"'
            --config 'source.vendor.directory="vendor"')
fi
status=0
cargo "$command" "${vendored[@]}" "$@" || status=$?
if (( status )) && [[ $command != fmt && $command != -* ]] &&
    ! cargo tree --locked --offline --edges no-dev "${vendored[@]}" \
        > /dev/null 2>&1; then
  say "error: crates are missing on this machine, and cargo cannot download" \
      "them." >&2
  printf '  %s\n' "Where there is a network, run \`cargo vendor\` in a copy of" \
    "this project, bring the folder vendor/ that it makes to" \
    "$project/vendor" "and run this again." >&2
fi
exit "$status"
