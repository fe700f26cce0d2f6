import Foundation

/// Reads an adapter's directory by the rules of mlx-swift (docs/reference/formats.md), which itself
/// does not notice a factor that is missing.
enum PlainAdapter {
    private static let dtypes: [String: Tensor.DType] = [
        "F16": .float16, "BF16": .bfloat16, "F32": .float32,
    ]

    /// Names and shapes of a directory that keeps the rules; no numbers are read.
    struct Layout {
        let base: String?
        let scale: Double
        let nLayers: Int
        let keys: [String]
        let dtype: Tensor.DType

        init(config: [String: JSON], tensors: TensorFile) throws {
            let parameters = config["lora_parameters"]?.object ?? [:]
            let keys = parameters["keys"]?.array ?? []
            let named = keys.compactMap(\.string).filter { !$0.isEmpty }
            guard config["fine_tune_type"]?.string == "lora", let nLayers = config["num_layers"]?.int,
                nLayers > 0, let rank = parameters["rank"]?.int, rank > 0,
                let scale = parameters["scale"]?.double, scale > 0,
                parameters["dropout"]?.double != nil, !keys.isEmpty, named.count == keys.count
            else {
                throw PackError("adapter_config.json: expected fine_tune_type 'lora', num_layers, and"
                    + " lora_parameters with rank, scale, dropout and keys")
            }
            let kinds = Set(tensors.tensors.values.map(\.dtype))
            guard kinds.count == 1, let dtype = dtypes[kinds.first ?? ""] else {
                throw PackError("adapters.safetensors: expected tensors of one floating dtype")
            }
            var (used, blocks) = (Set<String>(), Set<String>())
            for (name, one) in tensors.tensors {
                let parts = split(name, at: ".")
                let (path, leaf) = (parts.dropLast().joined(separator: "."), parts.last ?? "")
                let place = try ModulePath(path)
                guard ["lora_a", "lora_b"].contains(leaf), one.shape.count == 2, !one.shape.contains(0),
                    one.shape[leaf == "lora_a" ? 1 : 0] == rank, place.block < nLayers,
                    tensors.tensors[path + (leaf == "lora_a" ? ".lora_b" : ".lora_a")] != nil
                else {
                    throw PackError("adapters.safetensors: \(shown(name)) is no factor of a pair of"
                        + " rank \(rank) in \(nLayers) blocks")
                }
                used.insert(place.key)
                blocks.insert(place.blocks)
            }
            guard used == Set(named), blocks.count == 1 else {
                throw PackError("lora_parameters.keys are not the modules that have tensors")
            }
            (self.scale, self.nLayers, self.keys, self.dtype) = (scale, nLayers, named, dtype)
            base = config["base_model_name_or_path"]?.string
        }
    }

    /// The adapter with its numbers; throws PackError where one is no number.
    static func read(_ name: String, _ layout: Layout, _ file: TensorFile) throws -> Adapter {
        var tensors: [String: Tensor] = [:]
        for (name, entry) in file.tensors {
            let bytes = try file.read(entry)
            guard isFinite(bytes, layout.dtype) else {
                throw PackError("\(shown(name)) holds NaN or infinity; train it again")
            }
            tensors[name] = Tensor(dtype: layout.dtype, shape: entry.shape, data: Data(bytes))
        }
        return Adapter(
            name: name, base: layout.base, scale: layout.scale, nLayers: layout.nLayers,
            keys: layout.keys, tensors: tensors)
    }
}

/// True if no number of these bytes is NaN or infinity.
func isFinite(_ bytes: [UInt8], _ dtype: Tensor.DType) -> Bool {
    // Seven bits of the exponent are in the last byte, the eighth is above the one before.
    let (last, before): (UInt8, UInt8) = dtype == .float16 ? (0x7C, 0) : (0x7F, 0x80)
    return stride(from: dtype.size - 1, to: bytes.count, by: dtype.size).allSatisfy {
        bytes[$0] & last != last || bytes[$0 - 1] & before != before
    }
}
