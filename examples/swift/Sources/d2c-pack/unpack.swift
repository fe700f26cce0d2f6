import D2CPack
import Foundation

/// Write the adapters of a pack as `d2c-mlx export --to mlx` does: a directory each, and `tasks.json`.
///
/// With own ranks no module is padded: mlx-swift takes that, stock mlx-lm does not. The directory
/// must not exist; it appears once everything is in it.
func unpack(_ pack: Pack, to directory: URL, ownRanks: Bool) throws {
    let files = FileManager.default
    let temporary = directory.deletingLastPathComponent()
        .appendingPathComponent(".\(directory.lastPathComponent).\(UUID().uuidString).tmp")
    try files.createDirectory(at: temporary, withIntermediateDirectories: false)
    defer { try? files.removeItem(at: temporary) }
    var tasks: [String: Any] = [:]
    for task in pack.tasks {
        guard let adapter = try pack.adapter(for: task) else {
            tasks[task] = NSNull()
            continue
        }
        tasks[task] = adapter.name
        let folder = temporary.appendingPathComponent(adapter.name)
        if files.fileExists(atPath: folder.path) { continue }
        try files.createDirectory(at: folder, withIntermediateDirectories: false)
        try json(config(adapter)).write(to: folder.appendingPathComponent("adapter_config.json"))
        try write(adapter, to: folder.appendingPathComponent("adapters.safetensors"), ownRanks)
    }
    try json(tasks).write(to: temporary.appendingPathComponent("tasks.json"))
    try files.moveItem(at: temporary, to: directory)
}

private func json(_ value: Any) throws -> Data {
    try JSONSerialization.data(withJSONObject: value, options: [.sortedKeys, .withoutEscapingSlashes])
}

private func config(_ adapter: Adapter) -> [String: Any] {
    let parameters: [String: Any] = [
        "rank": adapter.rank, "scale": adapter.scale, "dropout": 0.0, "keys": adapter.keys,
    ]
    return [
        "base_model_name_or_path": adapter.base as Any? ?? NSNull(), "fine_tune_type": "lora",
        "num_layers": adapter.nLayers, "lora_parameters": parameters,
    ]
}

/// A safetensors file, one tensor in memory at a time.
private func write(_ adapter: Adapter, to file: URL, _ ownRanks: Bool) throws {
    func tensor(_ name: String) throws -> Tensor? {
        try ownRanks ? adapter.tensors[name] : adapter.padded(name)
    }
    let dtypes: [Tensor.DType: String] = [.float16: "F16", .bfloat16: "BF16", .float32: "F32"]
    let names = adapter.tensors.keys.sorted()
    var header: [String: Any] = ["__metadata__": ["format": "mlx"]]
    var start = 0
    for name in names {
        guard let one = try tensor(name) else { continue }
        header[name] = [
            "dtype": dtypes[one.dtype] ?? "", "shape": one.shape,
            "data_offsets": [start, start + one.data.count],
        ] as [String: Any]
        start += one.data.count
    }
    var text = try json(header)
    text.append(Data(repeating: 0x20, count: (8 - text.count % 8) % 8))
    try Data().write(to: file)
    let handle = try FileHandle(forWritingTo: file)
    defer { try? handle.close() }
    try handle.write(contentsOf: withUnsafeBytes(of: UInt64(text.count).littleEndian) { Data($0) } + text)
    for name in names { if let one = try tensor(name) { try handle.write(contentsOf: one.data) } }
}
