# Makes or refreshes a virtual environment; meant to be sourced by quickstart.sh and run_tests.sh.
#   make_environment FOLDER REQUIREMENTS_FILE
# PYTHON chooses the interpreter (default python3). It leaves the environment's folder in $ENVIRONMENT.

make_environment() {
    ENVIRONMENT=$1
    local requirements=$2 constraints=()
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        constraints=(-c constraints-cpu.txt)
    fi
    local stamp="$ENVIRONMENT/.installed-$(cat "$requirements" requirements.txt constraints-cpu.txt | cksum | cut -d' ' -f1)"
    if [ -e "$stamp" ]; then
        return 0
    fi
    echo "Installing into $ENVIRONMENT (once; about 1.5 GB without a GPU)"
    "${PYTHON:-python3}" -m venv "$ENVIRONMENT"
    "$ENVIRONMENT/bin/python" -m pip install --quiet --upgrade pip
    "$ENVIRONMENT/bin/python" -m pip install --quiet "${constraints[@]}" -r "$requirements"
    touch "$stamp"
}
