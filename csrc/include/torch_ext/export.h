// TORCH_EXT_API marks what the shared library exports; everything else is hidden.
#pragma once

#define TORCH_EXT_API __attribute__((visibility("default")))
