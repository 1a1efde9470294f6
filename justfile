# The commands that people run; CI runs the same ones. `just` lists them.

set positional-arguments

# Recipes that CI runs build with `--workspace`: a single package would get other features of the same
# dependencies, and all of them would be compiled twice.

export PYTHONDONTWRITEBYTECODE := "1"
# Packages of the manifests' schemas bring a pytest plugin that wants more packages.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD := "1"

# Python of the recipes that need one: a virtual environment with tests/openai_client/requirements.txt.
python := env("SERVELAB_PYTHON", "python3")
target := env("CARGO_TARGET_DIR", "target")

default:
    @just --list --unsorted

# Build and serve the embedded demo model on 127.0.0.1:8000.
demo *flags:
    cargo run --release -- serve "$@"

# What a change has to pass besides the tests: format, lints, licences.
check: fmt lint licences

fmt:
    cargo fmt --all --check

lint:
    cargo clippy --workspace --all-targets -- -D warnings

# The property tests with cases that nobody has seen yet; prints the seed.
properties seed=`date +%s`:
    @echo "PROPTEST_RNG_SEED={{ seed }}"
    PROPTEST_RNG_SEED={{ seed }} cargo test --workspace --lib --tests

# Licences and sources of all dependencies, against deny.toml; needs no network.
licences:
    cargo test --quiet --workspace --test dependencies

# Known vulnerabilities of the dependencies; needs cargo-deny and the network.
advisories:
    cargo deny check

# All tests. Needs no Python and no network.
test:
    cargo test --workspace

# The official OpenAI client, and libzmq with vLLM's message types, against the binary; needs the packages of tests/openai_client/requirements.txt.
test-openai:
    cargo test --quiet --workspace --test end_to_end --no-run
    {{ python }} -m pytest -q -p no:cacheprovider tests/openai_client --binary "{{ target }}/debug/servelab"

# The manifests of deploy/: every overlay rendered by kubectl and checked against the schemas of Kubernetes, KEDA and the
# Prometheus operator, and for the known traps. Needs kubectl and the packages of tests/deploy/requirements.txt.
test-deploy:
    {{ python }} -m pytest -q -p no:cacheprovider tests/deploy

# The manifests and the router's discovery on a real API server with its controllers, fifteen minutes. Needs the programs of
# Kubernetes and etcd (tests/cluster/README.md), named by the flags --etcd, --kube-apiserver and --kube-controller-manager.
test-cluster *flags:
    cargo build --release
    unshare --map-root-user --net --mount {{ python }} -m pytest -q -p no:cacheprovider tests/cluster \
        --binary "{{ target }}/release/servelab" "$@"

# Follow every lab on a release build, one after the other, and print what it shows beside what came out here; `just labs
# write` puts that into docs/labs. Needs prometheus and promtool.
labs mode="1":
    SERVELAB_LABS_RECORD="{{ mode }}" cargo test --quiet --release --workspace --test end_to_end -- labs:: --nocapture --test-threads 1

# Compile every CUDA kernel for every architecture with NVIDIA's run-time compiler, in a minute. Needs no GPU, but
# the packages of crates/model/tests/nvrtc/requirements.txt; SERVELAB_NVRTC_EVERY=1 for every combination.
kernels:
    SERVELAB_NVRTC="$({{ python }} crates/model/tests/nvrtc/find.py)" \
        cargo test --quiet --workspace --test cuda_nvrtc -- --nocapture

# The program on a GPU that the CPU plays, slowly: small batches are served, or `just emulated doctor --gpu --quick`. Needs
# a C++ compiler.
emulated *arguments="serve --max-running 4 --max-batched-tokens 64":
    folder="$(crates/model/src/cuda/emulator/libraries/build.sh target)" && \
        LD_LIBRARY_PATH="$folder" XDG_CACHE_HOME="$folder/cache" cargo run --release -- {{ arguments }}

# 2,000 requests to a replica, 50,000 through the router; resident memory must stay flat.
soak:
    SERVELAB_SOAK_REQUESTS=2000 SERVELAB_ROUTER_SOAK_REQUESTS=50000 \
        cargo test --release --workspace --test end_to_end -- --nocapture memory_stays_flat

# NVIDIA's aiperf (pip install aiperf) against a demo server that runs already, by default that of `just demo`.
aiperf url="http://127.0.0.1:8000" folder="target/aiperf":
    aiperf profile --model demo --url "{{ url }}" --endpoint-type chat --streaming \
        --tokenizer crates/model/demo --concurrency 16 --request-count 200 \
        --synthetic-input-tokens-mean 128 --output-tokens-mean 64 --extra-inputs ignore_eos:true \
        --use-server-token-count --ui simple --artifact-dir "{{ folder }}"

# Train the embedded demo model anew; needs the packages of crates/model/demo/train/requirements.txt.
train-demo *flags:
    {{ python }} crates/model/demo/train/train.py "$@"

# Make the fixtures of the tests anew, with Hugging Face transformers as the reference.
fixtures:
    {{ python }} crates/model/tests/fixtures/make_fixtures.py
    {{ python }} crates/text/tests/fixtures/make_fixtures.py

# Benchmarks of the engine and of the CPU's operations.
bench *flags:
    cargo bench --package servelab-benches "$@"

# What the router costs, beside no proxy, sglang-router and nginx as far as they are installed; about seven minutes.
router-overhead *flags:
    {{ python }} benches/routing/overhead.py "$@"

# What a replica carries whose device takes no time, traced and untraced; two minutes.
front-end *flags:
    {{ python }} benches/front_end/ceiling.py "$@"

# How far the simulated fleet is off a real one on this machine; twenty minutes.
fidelity *flags:
    {{ python }} benches/fidelity/compare.py "$@"

# How many requests a minute of a fleet are simulated; two minutes.
fleet-pace *flags:
    {{ python }} benches/fleet/pace.py "$@"

# Random fleets with random faults in virtual time, 200 seeds or the one given: nothing is lost, leaks or hangs.
sim seed="":
    SERVELAB_SIM_SEED="{{ seed }}" cargo test --quiet --workspace --test fleet random_fleets -- --nocapture

# Doctor, then everything that is claimed of the GPU beside the limits that it measured; into benches/results/gpu.
gpu *flags:
    cargo build --release
    PATH="$(dirname "$(command -v {{ python }})"):$PATH" benches/gpu/run.sh --binary "{{ target }}/release/servelab" "$@"
