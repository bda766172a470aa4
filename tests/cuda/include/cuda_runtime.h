// Stands where the toolkit's header would, so that the files of csrc/cuda compile as plain C++ for the processor.
#pragma once
#include "../emulate.h"
