export PYTHONPATH=src PYTHONUNBUFFERED=1
nvidia-smi -L
timeout 150 python3 benchmarks/tune_gpu.py --kinds forward,keys,queries --skip no --budget 130 --output $OUT/tuneA.csv
cp src/softpick/ops/triton/backward.py /tmp/A.py; cp .dev/bw_B.py src/softpick/ops/triton/backward.py
echo "=== B"; timeout 90 python3 benchmarks/tune_gpu.py --kinds keys --skip no --budget 80 --output $OUT/tuneB.csv
cp /tmp/A.py src/softpick/ops/triton/backward.py
echo "=== probe"; timeout 110 python3 .dev/probe.py
echo "=== splits"; timeout 100 python3 benchmarks/tune_gpu.py --kinds splits
echo "=== rows"; timeout 60 python3 benchmarks/tune_gpu.py --kinds rows
