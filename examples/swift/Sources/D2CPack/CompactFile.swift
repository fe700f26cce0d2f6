import Foundation

/// `compact.safetensors`: many adapters in a few bits, by d2c_mlx/compress/file_layout.py.
struct CompactFile {
    /// Rows of one bit width and row width; all adapters' rows are one tensor.
    struct Kind: Hashable {
        let bits: Int
        let width: Int
    }

    struct Module {
        let path: String
        let place: ModulePath
        let shape: [Int]
    }

    static let mostModules = 1 << 16
    static let mostWidth = 1 << 24
    static let mostPath = 256

    let file: TensorFile
    let names: [String]
    let base: String?
    let modules: [Module]
    let bits: [Int]
    let groupSize: Int
    /// Components of every adapter, module and bit width, in this order.
    let counts: [UInt8]

    init(_ file: TensorFile) throws {
        self.file = file
        guard file.metadata["format"] == .string("d2c-mlx-compact"),
            file.metadata["version"] == .string("1"), let text = file.metadata["index"]?.string,
            let index = try JSON.parse(Array(text.utf8)).object, let table = file.tensors["counts"],
            table.dtype == "U8", table.shape.count == 3
        else { throw PackError("expected d2c-mlx-compact version 1 with an index") }
        names = (index["names"]?.array ?? []).compactMap(\.string)
        base = index["base"]?.string
        bits = (index["bits"]?.array ?? []).compactMap(\.int)
        groupSize = index["group_size"]?.int ?? 0
        modules = try Self.expand(index["modules"]?.array ?? [], most: table.shape[1])
        counts = try file.read(table)
        guard names.allSatisfy(isPrintable), names.count == index["names"]?.array?.count,
            base != nil || index["base"] == .null, bits.count == index["bits"]?.array?.count,
            bits == [16, 8, 4, 3, 2].filter(bits.contains), [32, 64, 128].contains(groupSize),
            table.shape == [names.count, modules.count, bits.count],
            Set(modules.map(\.path)).count == modules.count, hasTensorsOfIndex()
        else { throw PackError("its tensors are not those that its index lists") }
    }

    /// Modules of `[pattern, in, out, layers]`, with layers such as "0-15,17".
    private static func expand(_ runs: [JSON], most: Int) throws -> [Module] {
        var found: [Module] = []
        for run in runs {
            let run = run.array ?? []
            guard run.count == 4, let pattern = run[0].string, let width = run[1].int,
                let out = run[2].int, let spans = run[3].string, pattern.utf8.count <= mostPath,
                (1...mostWidth).contains(width), (1...mostWidth).contains(out)
            else { throw PackError("the index has a path or a width beyond those of any model") }
            for span in split(spans, at: ",") {
                let ends = split(span, at: "-").map { Int($0) ?? -1 }
                guard ends.count <= 2, let low = ends.first, let high = ends.last, low >= 0, high >= low,
                    high - low < min(most, mostModules) - found.count
                else { throw PackError("the index has blocks that no model has") }
                for block in low...high {
                    let path = split(pattern, at: "*").joined(separator: String(block))
                    found.append(Module(path: path, place: try ModulePath(path), shape: [width, out]))
                }
            }
        }
        return found
    }

    /// Calls with every count above 0, in the order of the rows of an adapter.
    private func eachCount(_ range: Range<Int>, _ call: (Int, Int, Int) throws -> Void) rethrows {
        let size = modules.count * bits.count
        for i in range.lowerBound * size..<range.upperBound * size where counts[i] > 0 {
            try call(i % size / bits.count, bits[i % bits.count], Int(counts[i]))
        }
    }

    /// Number of rows of each kind that some adapters have.
    private func rows(_ adapters: Range<Int>) -> [Kind: Int] {
        var found: [Kind: Int] = [:]
        eachCount(adapters) { module, bits, n in
            for width in modules[module].shape { found[Kind(bits: bits, width: width), default: 0] += n }
        }
        return found
    }

    /// Tensors of a kind: name and bytes of a row.
    private func fields(_ kind: Kind) -> [(name: String, dtype: String, columns: Int)] {
        let name = "\(kind.bits)bit.\(kind.width)."
        if kind.bits == 16 { return [(name + "weight", "F16", kind.width)] }
        let groups = (kind.width + groupSize - 1) / groupSize
        return [
            (name + "weight", "U32", groups * groupSize * kind.bits / 32),
            (name + "scales", "F16", groups), (name + "biases", "F16", groups),
        ]
    }

    private func hasTensorsOfIndex() -> Bool {
        let expected = rows(0..<names.count)
        return expected.allSatisfy { kind, n in
            fields(kind).allSatisfy {
                file.tensors[$0.name]?.dtype == $0.dtype
                    && file.tensors[$0.name]?.shape == [n, $0.columns]
            }
        } && file.tensors.count == 1 + expected.keys.reduce(0) { $0 + fields($1).count }
    }

    /// One adapter in the dtype of the base's activations; nil if none of its modules is left.
    func adapter(_ k: Int, _ dtype: Tensor.DType, nLayers: Int) throws -> Adapter? {
        var stacks: [Kind: RowStack] = [:]
        let before = rows(0..<k)
        for (kind, n) in rows(k..<k + 1) {
            let start = before[kind] ?? 0
            let parts = try fields(kind).map { field -> [UInt8] in
                guard let entry = file.tensors[field.name] else { throw PackError("truncated") }
                let bytes = try file.read(entry, rows: start..<start + n)
                guard field.dtype == "U32" || isFinite(bytes, .float16) else {
                    throw PackError("adapter \(k) holds NaN or infinity; write the pack again")
                }
                return bytes
            }
            stacks[kind] = RowStack(kind: kind, groupSize: groupSize, parts: parts)
        }
        var rows: [Int: [[Float16]]] = [:]
        eachCount(k..<k + 1) { module, bits, n in
            for (side, width) in modules[module].shape.enumerated() {
                let kind = Kind(bits: bits, width: width)
                for _ in 0..<n {
                    if let row = stacks[kind]?.next() { rows[2 * module + side, default: []].append(row) }
                }
            }
        }
        var tensors: [String: Tensor] = [:]
        var keys = Set<String>()
        for (i, found) in rows {
            let module = modules[i / 2]
            guard module.place.block < nLayers else {
                throw PackError("\(shown(module.path)) is beyond the base's \(nLayers) blocks")
            }
            keys.insert(module.place.key)
            let name = module.path + (i % 2 == 0 ? ".lora_a" : ".lora_b")
            tensors[name] = factor(found, module.shape[i % 2], dtype, turned: i % 2 == 0)
        }
        return tensors.isEmpty ? nil : Adapter(
            name: "cluster-\(k)", base: base, scale: 1, nLayers: nLayers, keys: keys.sorted(),
            tensors: tensors)
    }
}

/// Rows as a tensor; turned, a row becomes a column.
private func factor(_ rows: [[Float16]], _ width: Int, _ dtype: Tensor.DType, turned: Bool) -> Tensor {
    var data = Data(capacity: rows.count * width * dtype.size)
    func add<T: FixedWidthInteger>(_ number: (Float16) -> T) {
        var numbers: [T] = []
        numbers.reserveCapacity(rows.count * width)
        if turned {
            for i in 0..<width { for row in rows { numbers.append(number(row[i]).littleEndian) } }
        } else {
            for row in rows { for x in row { numbers.append(number(x).littleEndian) } }
        }
        numbers.withUnsafeBytes { data.append(contentsOf: $0) }
    }
    switch dtype {
    case .float16: add { $0.bitPattern }
    case .float32: add { Float($0).bitPattern }
    case .bfloat16:
        // To the nearest, ties to even; a float16 is far from where that would overflow.
        add { x -> UInt16 in
            let bits = Float(x).bitPattern
            return UInt16(truncatingIfNeeded: (bits &+ 0x7FFF &+ (bits >> 16 & 1)) >> 16)
        }
    }
    return Tensor(dtype: dtype, shape: turned ? [width, rows.count] : [rows.count, width], data: data)
}
