// Precompiled once and shared by the library, the Python module, tests, benchmarks and examples.
#pragma once

#include <torch/library.h>
#include <torch/torch.h>
