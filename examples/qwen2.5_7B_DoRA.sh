#!/bin/sh
# qwen2.5_7B_DoRA.sh R ALPHA OUTPUT_DIR GPU [more flags]: DoRA on the commonsense rows with the DoRA paper's settings.
#   sh examples/qwen2.5_7B_DoRA.sh 32 64 ./finetuned_result/r32 0
# BASE_MODEL and DATA_PATH in the environment replace the model and the data.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/commonsense.sh"
commonsense_dora Qwen/Qwen2.5-7B 1e-4 "$@"
