#!/bin/sh
# llama3_8B_DoRA.sh R ALPHA OUTPUT_DIR GPU [more flags]: DoRA on the commonsense rows with the DoRA paper's settings.
#   sh examples/llama3_8B_DoRA.sh 32 64 ./finetuned_result/r32 0
# BASE_MODEL and DATA_PATH in the environment replace the model and the data.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/commonsense.sh"
commonsense_dora meta-llama/Meta-Llama-3-8B 1e-4 "$@"
