import D2CPack
import Foundation
import MLX
import MLXLLM
import MLXLMCommon
import TaskSwitch

#if os(iOS)
import os
#endif

/// Measures a pack on this device: first token, tokens a second, peak memory, thermal state, change of
/// adapter. The result is JSON as `d2c-mlx phone --json` prints it; as phone.json of a run it is in
/// the report.
///
/// One adapter is loaded. Prompts are token ids that every vocabulary has, since time and memory do not
/// depend on which they are. Use a process or an app that has done nothing else with MLX.
public final class PhoneBench {
    typealias Object = [String: Any]

    private let directory: URL
    private let pack: Pack
    private let model: any LanguageModel
    private let tasks: TaskSwitch
    private let bits: String
    private let limit: (nBytes: Int, source: String)
    private let decoded = 32
    private let runs = 3

    /// Load a model directory of mlx-lm and open a pack.
    public init(model directory: URL, pack path: URL) async throws {
        limit = memoryLimit()
        self.directory = directory
        pack = try Pack(directory: path)
        tasks = TaskSwitch(pack)
        let content = try Data(contentsOf: directory.appendingPathComponent("config.json"))
        let config = try JSONDecoder.json5().decode(BaseConfiguration.self, from: content)
        bits = config.perLayerQuantization?.quantization.map { "\($0.bits)" } ?? "16"
        model = try await LLMTypeRegistry.shared.createModel(
            configuration: content, modelType: config.modelType)
        try loadWeights(
            modelDirectory: directory, model: model, perLayerQuantization: config.perLayerQuantization)
    }

    /// Measure answers that end at so many tokens, prompt and answer together.
    public func result(contexts: [Int]) throws -> Data {
        let weights = Memory.activeMemory
        let tensors = try FileManager.default.contentsOfDirectory(
            at: directory, includingPropertiesForKeys: [.fileSizeKey]
        ).filter { $0.pathExtension == "safetensors" }
        let fileBytes = try tensors.reduce(0) {
            try $0 + ($1.resourceValues(forKeys: [.fileSizeKey]).fileSize ?? 0)
        }
        let name = pack.directory.lastPathComponent
        let change = try measureChange()
        let served = try pack.tasks.map { (task: $0, nBytes: try loadedBytes($0)) }
        guard let largest = served.max(by: { $0.nBytes < $1.nBytes }) else {
            throw BenchError(description: "\(name): no tasks")
        }
        try tasks.serve(largest.task, with: model)
        let peaks = try contexts.enumerated().map { i, context in
            try measure(context, runs: i == 0 ? 1 + runs : 1)
        }
        let rows: [Object] = peaks.map { peak in
            [
                "bits": bits, "pack": name, "context": peak["context"]!, "kv_bits": 16, "resident": 1,
                "disk": fileBytes + pack.nBytes, "peak": peak["peak"]!,
            ]
        }
        let free = try directory.resourceValues(forKeys: [.volumeAvailableCapacityKey])
        let storage = free.volumeAvailableCapacity ?? 0
        let refused: [Object] = rows.compactMap { row in
            let margin = limit.nBytes - (row["peak"] as! Int)
            let margins: Object = ["memory_margin": margin, "storage_margin": storage]
            return margin < 0 ? row.merging(margins) { $1 } : nil
        }
        let device = deviceName()
        let best: [Any] = contexts.map { _ in NSNull() }  // without rows no loss is known
        return try JSONSerialization.data(
            withJSONObject: [
                "format": "d2c-mlx-phone", "version": 3,
                "time": ISO8601DateFormatter().string(from: Date()),
                "model": ["name": directory.lastPathComponent, "compute_dtype": computeType()],
                "bases": [
                    bits: [
                        "bits": bits, "form": "as it is", "file_nbytes": fileBytes,
                        "weights_nbytes": weights,
                    ] as Object
                ],
                "packs": [
                    name: [
                        "path": name, "manifest_sha256": try pack.manifestHash(),
                        "storage": pack.isCompact ? "compact" : "plain", "nbytes": pack.nBytes,
                        "n_tasks": served.count,
                        "adapters_nbytes": served.map(\.nBytes).sorted(by: >),
                    ] as Object
                ],
                "devices": [
                    device: [
                        "chips": "", "memory": limit.nBytes, "memory_is": "measured",
                        "memory_source": limit.source, "storage": storage, "storage_is": "measured",
                        "storage_source": "free on the volume of the model", "best": best,
                        "refused": refused,
                    ] as Object
                ],
                "options": ["decode": decoded, "runs": runs], "contexts": contexts,
                "memory": ["chunk": 512, "lines": Object(), "peaks": peaks, "error": 0] as Object,
                "sweep": rows, "switch": [name: change], "quality": Object(), "n_rows": [Int](),
                "provenance": [
                    "machine": [
                        "device": device, "backend": onMetal ? "metal" : "cpu",
                        "system": ProcessInfo.processInfo.operatingSystemVersionString,
                        "memory": Int(ProcessInfo.processInfo.physicalMemory),
                    ] as Object,
                    "versions": Object(),
                ] as Object,
            ] as Object, options: [.prettyPrinted, .sortedKeys])
    }

    /// Peak and speed of an answer; of several runs the first is not timed.
    private func measure(_ context: Int, runs: Int) throws -> Object {
        guard context > 2 * decoded else {
            let problem = "contexts: found \(context), expected more than \(2 * decoded) tokens"
            throw BenchError(description: problem)
        }
        Memory.clearCache()
        Memory.peakMemory = 0
        let counted = Memory.activeMemory
        let times = try (0..<runs).map { _ in try answer(context - decoded, decoded) }
        let timed = times.count > 1 ? Array(times.dropFirst()) : times
        let (first, rest) = (median(timed.map(\.first)), median(timed.map(\.rest)))
        return [
            "bits": bits, "fitted": false, "context": context, "kv_bits": 16, "resident": 1,
            "peak": Memory.peakMemory, "counted": counted, "first_token_seconds": first,
            "prompt_tokens_per_second": Double(context - decoded) / first,
            "decode_tokens_per_second": Double(decoded - 1) / rest, "thermal": thermalState(),
        ]
    }

    /// Greedy decoding: seconds to the first token, and for the rest.
    private func answer(_ nPrompt: Int, _ nTokens: Int) throws -> (first: Double, rest: Double) {
        let prompt = MLXArray((0..<nPrompt).map { Int32(100 + $0 * 7919 % 900) })
        let parameters = GenerateParameters(
            maxTokens: nTokens, temperature: 0, prefillStepSize: 512)
        let start = now()
        var tokens = try TokenIterator(
            input: LMInput(tokens: prompt), model: model, parameters: parameters)
        _ = tokens.next()
        let first = now()
        while tokens.next() != nil {}
        let end = now()
        Stream().synchronize()  // the iterator is a token ahead
        return (first - start, end - first)
    }

    /// From an adapter in the page cache to the next token under it: medians, but the first.
    private func measureChange() throws -> Object {
        let changes = try (0...10).map { i in
            let task = pack.tasks[i % pack.tasks.count]
            let start = now()
            _ = try pack.adapter(for: task)
            let read = now()
            try tasks.serve(task, with: model)
            eval(model)
            let served = now()
            _ = try answer(1, 1)
            let attach = max(0, served - read - (read - start))  // it reads the adapter, too
            return [read - start, attach, now() - served]
        }.dropFirst()
        try tasks.serve(nil, with: model)
        let parts = (0..<3).map { part in median(changes.map { $0[part] }) }
        return [
            "read_seconds": parts[0], "attach_seconds": parts[1], "token_seconds": parts[2],
            "seconds": median(changes.map { $0.reduce(0, +) }), "switches": changes.count,
        ]
    }

    private func loadedBytes(_ task: String) throws -> Int {
        try pack.adapter(for: task)?.tensors.values.reduce(0) { $0 + $1.data.count } ?? 0
    }

    /// What activations are in: the dtype of norms, which are never quantized.
    private func computeType() -> String {
        let norm = model.parameters().flattened().first { $0.0.hasSuffix("norm.weight") }
        return norm.map { "\($0.1.dtype)" } ?? "unknown"
    }
}

struct BenchError: Error, CustomStringConvertible { let description: String }

private func now() -> Double { ProcessInfo.processInfo.systemUptime }

private func median(_ values: [Double]) -> Double {
    let (sorted, half) = (values.sorted(), values.count / 2)
    return values.count % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2
}

/// What an app may use before the system ends it; on a Mac what Metal recommends.
private func memoryLimit() -> (nBytes: Int, source: String) {
    #if os(iOS)
    return (Int(os_proc_available_memory()), "os_proc_available_memory at launch")
    #elseif os(macOS)
    let nBytes = GPU.maxRecommendedWorkingSetBytes() ?? Int(ProcessInfo.processInfo.physicalMemory)
    return (nBytes, "the GPU's recommendedMaxWorkingSetSize")
    #else
    return (Int(ProcessInfo.processInfo.physicalMemory), "physical memory")
    #endif
}

private var onMetal: Bool {
    #if os(Linux)
    return false
    #else
    return Device.defaultDevice().deviceType == .gpu
    #endif
}

private func thermalState() -> String {
    #if os(Linux)
    return "unknown"
    #else
    switch ProcessInfo.processInfo.thermalState {
    case .nominal: return "nominal"
    case .fair: return "fair"
    case .serious: return "serious"
    case .critical: return "critical"
    @unknown default: return "unknown"
    }
    #endif
}

/// A model's identifier, such as iPhone16,1 or Mac15,3; on Linux that of the system.
private func deviceName() -> String {
    #if os(Linux)
    return "Linux"
    #else
    #if os(macOS)
    let key = "hw.model"
    #else
    let key = "hw.machine"
    #endif
    var size = 0
    sysctlbyname(key, nil, &size, nil, 0)
    var bytes = [UInt8](repeating: 0, count: size)
    sysctlbyname(key, &bytes, &size, nil, 0)
    return String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
    #endif
}
