#!/bin/sh
# llama2_7B_DoRA.sh R ALPHA OUTPUT_DIR GPU [more flags]: DoRA on the commonsense rows with the DoRA paper's settings.
#   sh examples/llama2_7B_DoRA.sh 32 64 ./finetuned_result/r32 0
# BASE_MODEL and DATA_PATH in the environment replace the model and the data.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/commonsense.sh"
commonsense_dora meta-llama/Llama-2-7b-hf 2e-4 "$@"
